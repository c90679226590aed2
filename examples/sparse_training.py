"""Train a small sparse network by any of the methods of ip_plugin, in either space.

An ordinary pipeline on scikit-learn's digits::

    python examples/sparse_training.py --method rigl --sparsity 0.98
    python examples/sparse_training.py --method rigl --sparsity 0.98 --interspace
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from ip_plugin import interspace, param_groups, report
from ip_plugin.methods import SET, Gradual, LotteryTicket, RigL, grasp, lamp, magnitude, prune, random, snip, synflow

BATCH = 100


def load():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


def build():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def fit(model, optimizer, images, labels, epochs, lr, schedule=None):
    steps = epochs * len(range(0, len(labels), BATCH))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):

            def loss(batch=batch):
                return F.cross_entropy(model(images[batch]), labels[batch])

            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            scheduler.step()
            if isinstance(schedule, RigL):
                schedule.step(loss)
            elif schedule is not None:
                schedule.step()


@torch.no_grad()
def accuracy(model, images, labels):
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main():
    at_initialisation = ("random", "magnitude", "snip", "grasp", "synflow")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    methods = [*at_initialisation, "finetune", "lamp", "gradual", "ticket", "set", "rigl"]
    parser.add_argument("--method", choices=methods, default="rigl")
    parser.add_argument("--interspace", action="store_true", help="sparse coefficients of filters, not sparse weights")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = load()
    model = build()
    weights = report(model).prunable.parameters
    if args.interspace:
        interspace(model, basis="orthonormal", sharing="model")
    # Bases count: both spaces keep equally many numbers.
    sparsity = args.sparsity + report(model).prunable.basis_parameters / weights
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=args.lr, momentum=0.9)
    train = partial(fit, model, optimizer, train_images, train_labels)
    steps = args.epochs * len(range(0, len(train_labels), BATCH))
    batches = list(zip(train_images.split(BATCH), train_labels.split(BATCH), strict=True))
    scores = {
        # Another seed than that of the weights: with the same one, scores would rank them.
        "random": partial(random, generator=torch.Generator().manual_seed(args.seed + 1000)),
        "magnitude": magnitude,
        "snip": partial(snip, batches=batches, loss=F.cross_entropy),
        "grasp": partial(grasp, batches=batches, loss=F.cross_entropy),
        "synflow": partial(synflow, example_input=train_images[:1]),
    }

    if args.method in at_initialisation:
        prune(
            model,
            scores[args.method],
            sparsity=sparsity,
            rounds=100 if args.method == "synflow" else 1,
            min_per_layer=1,
        )
        train(args.epochs, args.lr)
    elif args.method in ("finetune", "lamp"):
        train(args.epochs, args.lr)
        prune(model, lamp if args.method == "lamp" else magnitude, sparsity=sparsity, min_per_layer=1)
        train(max(1, args.epochs // 2), args.lr / 4)
    elif args.method == "ticket":
        train(1, args.lr / 10)
        ticket = LotteryTicket(model, optimizer, min_per_layer=1)
        rounds = 4
        for _ in range(rounds):
            train(args.epochs, args.lr)
            ticket.next_round(1 - (1 - sparsity) ** (1 / rounds))
        train(args.epochs, args.lr)
    else:
        end = 3 * steps // 4
        schedule = {
            "gradual": lambda: Gradual(
                model, sparsity=sparsity, begin_step=steps // 5, end_step=end, update_every=4, min_per_layer=1
            ),
            "set": lambda: SET(model, optimizer, sparsity=sparsity, end_step=end, update_every=8, seed=args.seed),
            "rigl": lambda: RigL(model, optimizer, sparsity=sparsity, end_step=end, update_every=8, seed=args.seed),
        }[args.method]()
        train(args.epochs, args.lr, schedule)

    found = report(model).prunable
    left = found.nonzeros + found.basis_parameters
    print(f"{args.method}: {accuracy(model, test_images, test_labels):.1f} %, {left} of {weights} numbers left")


if __name__ == "__main__":
    main()
