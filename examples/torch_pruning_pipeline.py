"""Train, remove channels and fine-tune a small network with Torch-Pruning, in either space.

An ordinary pipeline on scikit-learn's digits. What makes it interspace pruning is the flag::

    python examples/torch_pruning_pipeline.py --ratio 0.7
    python examples/torch_pruning_pipeline.py --ratio 0.7 --interspace
"""

import argparse

import torch
import torch.nn.functional as F
import torch_pruning as tp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from ip_plugin import bake, interspace
from ip_plugin.adapters.torch_pruning import count_ops_and_params, pruner


def load():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x):
        return F.relu(x + self.second(self.first(x)))


def build():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), Block(32), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), Block(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def fit(model, optimizer, images, labels, epochs, regularize=None):
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            if regularize is not None:
                regularize(model)
            optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model, images, labels):
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="act on coefficients of filters instead of weights")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the channels to remove")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--finetune-epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = load()
    model = build()
    if args.interspace:
        interspace(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    example = test_images[:1]

    cutter = pruner(
        tp.pruner.GroupNormPruner, model, example, optimizer=optimizer, ignored_layers=[model[-1]],
        importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=args.ratio, global_pruning=True,
        iterative_steps=2,
    )  # fmt: skip
    macs, parameters = count_ops_and_params(model, example)
    fit(model, optimizer, train_images, train_labels, args.epochs, cutter.regularize)
    print(f"trained:    {accuracy(model, test_images, test_labels):.1f} %, {macs / 1e6:.2f} M operations")

    for step in (1, 2):
        cutter.step()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 0.02
        fit(model, optimizer, train_images, train_labels, args.finetune_epochs)
        left, kept = count_ops_and_params(model, example)
        print(
            f"step {step}:     {accuracy(model, test_images, test_labels):.1f} %, {left / macs:.0%} of the operations, "
            f"{kept / parameters:.0%} of the parameters"
        )

    bake(model)  # an ordinary, smaller network
    print(f"baked:      {accuracy(model, test_images, test_labels):.1f} %, first layer {tuple(model[0].weight.shape)}")


if __name__ == "__main__":
    main()
