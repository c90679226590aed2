"""Train, prune and save a network, then load it in a fresh process and run it sparse, in either space.

An ordinary pipeline on scikit-learn's digits, and what its network costs where it is used::

    python examples/deploy.py --sparsity 0.95
    python examples/deploy.py --sparsity 0.95 --interspace

The fresh process is this file with the option --deploy: the folder with what was saved. It needs no training data, and
knows the network by `build` alone.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from ip_plugin import bake, interspace, load, report, save
from ip_plugin.methods import lamp, prune
from ip_plugin.utils.timing import side_by_side

IMAGES = 50  # whose outputs are compared


def read():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=digits.target)
    return images[train], labels[train], images[test], labels[test]


def build():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(128, 192, 3, padding=1), nn.BatchNorm2d(192), nn.ReLU(),
        nn.Conv2d(192, 192, 3, padding=1), nn.BatchNorm2d(192), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


def fit(model, images, labels, epochs, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model, images, labels):
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def train(args, folder):
    """Here the network is made; what is deployed is left in the folder."""
    torch.manual_seed(args.seed)
    train_images, train_labels, test_images, test_labels = read()
    model = build()
    if args.interspace:
        interspace(model)

    fit(model, train_images, train_labels, args.epochs, lr=0.05)
    print(f"trained:    {accuracy(model, test_images, test_labels):.1f} %")

    prune(model, lamp, sparsity=args.sparsity)
    print(f"pruned:     {accuracy(model, test_images, test_labels):.1f} %")

    fit(model, train_images, train_labels, args.finetune_epochs, lr=0.02)
    print(f"fine-tuned: {accuracy(model, test_images, test_labels):.1f} %", flush=True)

    save(model, folder / "model.safetensors")  # before it is baked
    with torch.no_grad():
        examples = {"images": test_images[:IMAGES], "outputs": model(test_images[:IMAGES])}
    torch.save(examples, folder / "examples.pt")
    torch.save(bake(model).state_dict(), folder / "dense.pt")  # an ordinary network: what its zeros cost otherwise


@torch.no_grad()
def deploy(folder):
    """Here it is used, in a process that knows nothing of the training."""
    torch.set_num_threads(1)
    model = load(build(), folder / "model.safetensors").eval()
    examples = torch.load(folder / "examples.pt", weights_only=True)
    image = examples["images"][:1]
    dense = bake(copy.deepcopy(model))
    check("loaded", dense, examples)

    sizes = [(folder / name).stat().st_size for name in ("dense.pt", "model.safetensors")]
    try:
        from ip_plugin.sparse import prepare
    except ImportError as error:
        show("bytes", [f"{size:,}" for size in sizes], times(*sizes, "smaller", "larger"))
        print(f"The latency is not measured: {error}")
        return
    network = prepare(model, image)
    check("run sparse", network, examples)
    found = side_by_side({"dense": partial(dense, image), "sparse": partial(network, image)}, rounds=100, warmup=10)
    latencies = [1000 * statistics.median(found[name]) for name in ("dense", "sparse")]

    for row in report(network, image).rows:
        print(f"layer {row.layer}: {row.sparsity:.1%} zeros, run {row.runs}")
    show("", ["dense", "sparse"], "")
    show("bytes", [f"{size:,}" for size in sizes], times(*sizes, "smaller", "larger"))
    show("latency", [f"{latency:.2f} ms" for latency in latencies], times(*latencies, "faster", "slower"))
    print("The latency is that of one image with one thread; dense is the baked network, run by torch as it is.")


def check(what, network, examples):
    """One image at a time, as it is used."""
    outputs = torch.cat([network(image) for image in examples["images"].split(1)])
    error = (outputs - examples["outputs"]).abs().max().item() / examples["outputs"].abs().max().item()
    print(f"{what}: outputs differ by {error:.0e} of the largest one")
    if not error < 1e-4:
        sys.exit(f"{what}, the network does not compute what was saved")


def show(name, cells, remark):
    print(f"{name:8}", *(f"{cell:>12}" for cell in cells), f"  {remark}")


def times(dense, sparse, less, more):
    return f"{dense / sparse:.1f} times {less}" if sparse < dense else f"{sparse / dense:.1f} times {more}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interspace", action="store_true", help="prune coefficients of filters instead of weights")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--finetune-epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--deploy", type=Path, metavar="FOLDER", help="do not train; load what is there, and measure it"
    )
    args = parser.parse_args()

    if args.deploy is not None:
        deploy(args.deploy)
        return
    with tempfile.TemporaryDirectory() as folder:
        train(args, Path(folder))
        sys.exit(subprocess.run([sys.executable, __file__, "--deploy", folder]).returncode)


if __name__ == "__main__":
    main()
