"""Train, prune and fine-tune a segmentation network of torchvision, and export it, in either space.

On made-up images. What makes it interspace pruning is the flag::

    python examples/integrations/torchvision_segmentation.py
    python examples/integrations/torchvision_segmentation.py --interspace
"""

import argparse
import tempfile

import torch
import torch.nn.functional as F
from images import squares
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from ip_plugin import bake, interspace, prunable, report
from ip_plugin.adapters import torch_prune as prune
from ip_plugin.methods import lamp


def fit(model, loader, epochs, lr):
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for images, masks in loader:
            loss = F.cross_entropy(model(images)["out"], masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model, images, masks):
    return (model.eval()(images)["out"].argmax(1) == masks).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--finetune-epochs", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, _, masks = squares(32, size=64)
    loader = DataLoader(TensorDataset(images, masks), batch_size=8, shuffle=True)
    images, _, masks = squares(8, size=64, seed=1)
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3  # for few steps
    if args.interspace:
        interspace(model)
    fit(model, loader, args.epochs, lr=2e-3)
    print(f"trained:    {accuracy(model, images, masks):.1%} of the pixels right")

    prune.global_unstructured(
        prunable(model), prune.L1Unstructured, importance_scores=lamp(model), amount=args.sparsity
    )
    fit(model, loader, args.finetune_epochs, lr=1e-3)
    right = accuracy(model, images, masks)
    print(f"fine-tuned: {right:.1%} of the pixels right, {report(model).prunable.sparsity:.1%} zeros")

    outputs = model(images)["out"]
    bake(model)  # an ordinary network
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(torch.export.export(model, (images,)), f"{folder}/model.pt2")
        exported = torch.export.load(f"{folder}/model.pt2").module()
    error = (exported(images)["out"] - outputs).abs().max() / outputs.abs().max()
    print(f"exported:   outputs differ by {error:.0e}")


if __name__ == "__main__":
    main()
