"""Train, prune and fine-tune a small network with NNI, in either space.

An ordinary pipeline on scikit-learn's digits: NNI's level pruner prunes more and more while the network trains (AGP).
What makes it interspace pruning is the flag::

    python examples/nni_pipeline.py --sparsity 0.98
    python examples/nni_pipeline.py --sparsity 0.98 --interspace
"""

import argparse

import nni
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from ip_plugin import bake, interspace
from ip_plugin.adapters.nni import AGPPruner, LevelPruner, TorchEvaluator, finish


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


def loss(batch, model):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def training_loop(images, labels):
    """A training function as NNI's evaluator takes it."""

    def fit(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        steps = 0
        while True:
            for batch in torch.randperm(len(labels)).split(100):
                optimizer.zero_grad()
                training_step((images[batch], labels[batch]), model).backward()
                optimizer.step()
                steps += 1
                if steps == max_steps:
                    return
            if scheduler is not None:
                scheduler.step()
            if max_epochs is not None:
                max_epochs -= 1
                if not max_epochs:
                    return

    return fit


@torch.no_grad()
def accuracy(model, images, labels):
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--pruning-steps", type=int, default=30)
    parser.add_argument("--finetune-epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = load()
    model = build()
    if args.interspace:
        interspace(model)

    fit = training_loop(train_images, train_labels)

    def sgd():
        return nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    optimizer = sgd()
    fit(model, optimizer, loss, max_epochs=args.epochs)
    print(f"trained:    {accuracy(model, test_images, test_labels):.1f} %")

    settings = {"target_names": ["weight"], "sparse_ratio": args.sparsity, "global_group_id": "all"}
    evaluator = TorchEvaluator(fit, optimizer, loss)
    pruner = LevelPruner(model, [{"op_types": ["Conv2d", "Linear"], **settings}], evaluator)
    rounds = min(10, args.pruning_steps)
    schedule = AGPPruner(pruner, interval_steps=args.pruning_steps // rounds, total_times=rounds)
    _, masks = schedule.compress(args.pruning_steps, None)
    finish(schedule)
    pruned = sum(int((mask["weight"] == 0).sum()) for mask in masks.values())
    print(f"pruned:     {accuracy(model, test_images, test_labels):.1f} %, {pruned} entries")

    optimizer = sgd()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.finetune_epochs)
    fit(model, optimizer, loss, scheduler, max_epochs=args.finetune_epochs)
    print(f"fine-tuned: {accuracy(model, test_images, test_labels):.1f} %")

    bake(model)  # an ordinary network again
    print(f"baked:      {accuracy(model, test_images, test_labels):.1f} %, {type(model[0]).__name__}")


if __name__ == "__main__":
    main()
