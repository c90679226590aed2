"""Train and prune a small network on scikit-learn's digits: an ordinary script, and a trial of an NNI experiment.

By itself it takes its parameters from the command line; in an experiment (see run.py) NNI's come before them::

    python examples/nni_experiment/trial.py --space interspace --sparsity 0.98
"""

import argparse

import nni
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from ip_plugin import interspace, param_groups, prunable, report
from ip_plugin.adapters import torch_prune as prune

CRITERIA = {"magnitude": prune.L1Unstructured, "random": prune.RandomUnstructured}


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


def fit(model, data, epochs, lr):
    """Train, and report the accuracy after each epoch."""
    if epochs == 0:
        return
    images, labels, *test = data
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=lr, momentum=0.9)
    steps = epochs * len(range(0, len(labels), 100))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(labels)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
        nni.report_intermediate_result(accuracy(model, *test))


@torch.no_grad()
def accuracy(model, images, labels):
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", choices=["spatial", "interspace"], default="spatial")
    parser.add_argument("--criterion", choices=sorted(CRITERIA), default="magnitude")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--finetune-epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parameters = vars(parser.parse_args()) | nni.get_next_parameter()
    args = argparse.Namespace(**parameters)

    torch.manual_seed(args.seed)
    data = load()
    model = build()
    total = report(model).prunable.parameters
    if args.space == "interspace":
        interspace(model, sharing="model")  # one basis: on a network this small one for each layer would cost much

    fit(model, data, args.epochs, 0.15)
    bases = report(model).prunable.basis_parameters  # they count: both spaces keep equally many numbers
    amount = round(args.sparsity * total) + bases
    prune.global_unstructured(prunable(model), pruning_method=CRITERIA[args.criterion], amount=amount)
    fit(model, data, args.finetune_epochs, 0.15)

    left = report(model).prunable.nonzeros + bases
    final = accuracy(model, *data[2:])
    nni.report_final_result({"default": final, "parameters_left": left, **parameters})
    print(f"{args.space}, {args.criterion} at {args.sparsity:g}: {final:.1f} %, {left} parameters left")


if __name__ == "__main__":
    main()
