"""Train, prune and fine-tune a detector of torchvision, and load it again, in either space.

On made-up images. What makes it interspace pruning is the flag::

    python examples/integrations/torchvision_detection.py
    python examples/integrations/torchvision_detection.py --interspace
"""

import argparse
import tempfile

import torch
from images import squares
from torch.utils.data import DataLoader
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from ip_plugin import interspace, load, report, save
from ip_plugin.methods import lamp, prune


def build():
    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)


def collate(examples):
    images, boxes = zip(*examples, strict=True)
    return images, [{"boxes": box[None].float(), "labels": torch.tensor([1])} for box in boxes]


def fit(model, loader, epochs, lr):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for images, targets in loader:
            loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--finetune-epochs", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, boxes, _ = squares(16, size=96)
    loader = DataLoader(list(zip(images, boxes, strict=True)), batch_size=4, shuffle=True, collate_fn=collate)
    model = build()
    if args.interspace:
        interspace(model)
    print(f"trained:    loss {fit(model, loader, args.epochs, lr=0.02):.2f}")

    prune(model, lamp, sparsity=args.sparsity)
    loss = fit(model, loader, args.finetune_epochs, lr=0.01)
    print(f"fine-tuned: loss {loss:.2f}, {report(model).prunable.sparsity:.1%} zeros")

    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/detector.safetensors")
        loaded = load(build(), f"{folder}/detector.safetensors")
    boxes, expected = (network.eval()(images[:1])[0]["boxes"] for network in (loaded, model))
    print(f"loaded:     {len(boxes)} boxes, equal:", torch.equal(boxes, expected))


if __name__ == "__main__":
    main()
