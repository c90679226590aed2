"""Train, prune and fine-tune a small network with torch.nn.utils.prune, in either space.

An ordinary pipeline on scikit-learn's digits. What makes it interspace pruning is the flag::

    python examples/torch_prune_pipeline.py --sparsity 0.98
    python examples/torch_prune_pipeline.py --sparsity 0.98 --interspace
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from ip_plugin import bake, interspace
from ip_plugin.adapters import torch_prune as prune


def load():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


def build():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def fit(model, images, labels, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model, images, labels):
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--finetune-epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = load()
    model = build()
    if args.interspace:
        interspace(model)

    fit(model, train_images, train_labels, args.epochs)
    print(f"trained:    {accuracy(model, test_images, test_labels):.1f} %")

    layers = [(module, "weight") for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=args.sparsity)
    pruned = sum(int((module.weight_mask == 0).sum()) for module, _ in layers)
    print(f"pruned:     {accuracy(model, test_images, test_labels):.1f} %, {pruned} entries")

    fit(model, train_images, train_labels, args.finetune_epochs)
    for module, name in layers:
        prune.remove(module, name)
    print(f"fine-tuned: {accuracy(model, test_images, test_labels):.1f} %")

    bake(model)  # an ordinary network again
    print(f"baked:      {accuracy(model, test_images, test_labels):.1f} %, {type(model[0]).__name__}")


if __name__ == "__main__":
    main()
