"""What the switch to the interspace does to ordinary pruning scripts, under every constraint of the filters.

    python benchmarks/switch.py digits switch-study            # every space, optimizer, method and seed
    python benchmarks/switch.py cifar10 switch-study --data cifar10.npz --spaces SP,unit-standard
    python benchmarks/switch.py digits switch-study --table    # what came out
    python benchmarks/switch.py digits switch-study --kept adam-constant

A cell is a space, an optimizer and a seed: in it, each method prunes to 50, 75, 90, 95 and 98 % of the prunable
entries, the same number in every space (bases are not counted: someone who switches asks for the same amount).
``<task>.csv`` has accuracies in percent, on images that are held out of the training images, and for the iterative
method the share of each layer that is kept. Test images are read with ``--test`` only. A study that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import interspace, report
from ip_plugin.adapters import torch_prune
from ip_plugin.compare.augmentation import Augmentation
from ip_plugin.compare.config import Data
from ip_plugin.compare.data import Split, load
from ip_plugin.compare.models import NETWORKS
from ip_plugin.methods import Gradual, RigL, lamp, prune, snip
from ip_plugin.utils.atomic import write_whole

SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98)
BASES = {
    "standard": {"basis": "standard", "sharing": "layer"},
    "shared": {"basis": "orthonormal", "sharing": "model"},
    "standard shared": {"basis": "standard", "sharing": "model"},
}
CONSTRAINTS = ("none", "unit", "orthonormal")
SPACES = ("SP", *(f"{constraint}-{basis}" for constraint in CONSTRAINTS for basis in BASES))
OPTIMIZERS = ("sgd-onecycle", "sgd-constant", "adam-constant", "adamw-cosine")


@dataclass(frozen=True)
class Setting:
    """A data set as the study uses it, and how a network is trained on it.

    Attributes:
        train, held_out: how many of the training images are trained on, and how many accuracies are measured on.
        epochs, tuned: of training, and of fine-tuning after each pruning.
        batch: images in a batch.
        onecycle, constant: learning rates of SGD.
    """

    network: Callable[[], nn.Module]
    train: int
    held_out: int
    epochs: int
    tuned: int
    batch: int
    onecycle: float
    constant: float


def small() -> nn.Module:
    """A network as tutorials have it: no norms, three convolutions and a linear layer of 320 entries."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def vgg() -> nn.Module:
    """The network for CIFAR-10."""
    return NETWORKS["vgg"](3, 10)


SETTINGS = {
    "digits": Setting(small, train=600, held_out=298, epochs=20, tuned=6, batch=50, onecycle=0.05, constant=0.02),
    "cifar10": Setting(
        lambda: NETWORKS["vgg"](3, 10),
        train=2000,
        held_out=2000,
        epochs=4,
        tuned=1,
        batch=50,
        onecycle=0.1,
        constant=0.03,
    ),
}


@dataclass(frozen=True)
class Row:
    """One network, pruned in one way."""

    space: str
    optimizer: str
    method: str
    sparsity: float
    seed: int
    accuracy: float
    kept: str = ""


Splits = tuple[Tensor, Tensor, Tensor, Tensor]
MIRRORED = Augmentation(("RandomHorizontalFlip",))


def images(task: str, data: str | None, test: bool) -> Splits:
    """Images and labels to train on, and to measure on."""
    setting = SETTINGS[task]
    loaded = load(Data(source=data or task))
    train, last = loaded.train, loaded.test
    assert isinstance(train, Split)
    assert isinstance(last, Split)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    chosen, held_out = order[: setting.train], order[setting.train : setting.train + setting.held_out]
    measured = last if test else Split(train.images[held_out], train.labels[held_out])
    return train.images[chosen], train.labels[chosen], measured.images, measured.labels


class Script:
    """A pruning script: a model, its optimizer and its schedule, as someone writes them who knows of no space."""

    def __init__(self, model: nn.Module, optimizer: str, task: str, splits: Splits, seed: int) -> None:
        self.model, self.name, self.task, self.splits = model, optimizer, task, splits
        self.setting = SETTINGS[task]
        self.order = torch.Generator().manual_seed(seed)
        self.optimizer = self._optimizer(1.0)

    def _optimizer(self, factor: float) -> torch.optim.Optimizer:
        parameters = list(self.model.parameters())
        if self.name == "adam-constant":
            return torch.optim.Adam(parameters, lr=3e-3)
        if self.name == "adamw-cosine":
            return torch.optim.AdamW(parameters, lr=3e-3 * factor, weight_decay=0.05)
        lr = self.setting.onecycle * factor if self.name == "sgd-onecycle" else self.setting.constant
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)

    def train(
        self, epochs: int, factor: float = 1.0, after: Callable[[Callable[[], Tensor]], object] | None = None
    ) -> None:
        """Train; schedules that end small begin anew, with a new optimizer and a part of the learning rate."""
        steps = epochs * math.ceil(self.setting.train / self.setting.batch)
        scheduler: Any = None
        if self.name in ("sgd-onecycle", "adamw-cosine"):
            if factor != 1:
                self.optimizer = self._optimizer(factor)
            if self.name == "sgd-onecycle":
                lr = self.optimizer.param_groups[0]["lr"]
                scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps)
            else:
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.model.train()
        x, y, _, _ = self.splits
        for _ in range(epochs):
            for batch in torch.randperm(len(y), generator=self.order).split(self.setting.batch):
                inputs = MIRRORED(x[batch], self.order) if self.task == "cifar10" else x[batch]

                def loss(inputs: Tensor = inputs, targets: Tensor = y[batch]) -> Tensor:
                    return F.cross_entropy(self.model(inputs), targets)

                self.optimizer.zero_grad()
                loss().backward()
                self.optimizer.step()
                if after is not None:
                    after(loss)
                if scheduler is not None:
                    scheduler.step()

    def tune(self) -> None:
        """Fine-tune."""
        self.train(self.setting.tuned, 0.25)

    @torch.no_grad()
    def accuracy(self) -> float:
        """In percent, on the images that are measured on."""
        self.model.eval()
        _, _, x, y = self.splits
        right = sum(int((self.model(part).argmax(1) == labels).sum()) for part, labels in
                    zip(x.split(1000), y.split(1000), strict=True))  # fmt: skip
        return 100 * right / len(y)


def layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[tuple[nn.Module, str]]:
    """What a script prunes."""
    return [(module, "weight") for module in model.modules() if isinstance(module, kinds)]


def threshold(model: nn.Module, kinds: tuple[type[nn.Module], ...], sparsity: float) -> None:
    """One threshold for the magnitudes of all layers of some kinds, by `global_unstructured`."""
    pairs = layers(model, kinds)
    total = sum(getattr(*pair).numel() for pair in pairs)
    gone = sum(int((~mask).sum()) for mask in _masks(model, kinds))
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=round(sparsity * total) - gone)


def _masks(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[Tensor]:
    from ip_plugin import masks

    modules = dict(model.named_modules())
    yield from (mask for name, mask in masks(model).items() if isinstance(modules[name], kinds))


def shares(model: nn.Module) -> str:
    """The share of its entries that each layer keeps."""
    return json.dumps({row.layer: round(1 - row.sparsity, 4) for row in report(model).rows})


CONVOLUTIONS = (nn.Conv2d,)
BOTH = (nn.Conv2d, nn.Linear)


def cell(task: str, data: str | None, space: str, optimizer: str, seed: int, test: bool) -> list[Row]:
    """Everything of one space, optimizer and seed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    splits = images(task, data, test)
    setting = SETTINGS[task]
    rows: list[Row] = []

    def script() -> Script:
        torch.manual_seed(seed)
        model = setting.network()
        if space != "SP":
            constraint, basis = space.split("-")
            interspace(model, constraint=constraint, seed=seed, **BASES[basis])
        return Script(model, optimizer, task, splits, seed)

    def note(method: str, sparsity: float, done: Script, kept: bool = False) -> None:
        rows.append(Row(space, optimizer, method, sparsity, seed, done.accuracy(), shares(done.model) if kept else ""))

    dense = script()
    dense.train(setting.epochs)
    note("dense", 0.0, dense)
    once: dict[str, Callable[[nn.Module, float], object]] = {
        "one-shot": lambda model, sparsity: threshold(model, BOTH, sparsity),
        "one-shot, convolutions": lambda model, sparsity: threshold(model, CONVOLUTIONS, sparsity),
        "LAMP": lambda model, sparsity: prune(model, lamp, sparsity=sparsity),
    }
    for method, pruned in once.items():
        for sparsity in SPARSITIES:
            branch = copy.deepcopy(dense)
            pruned(branch.model, sparsity)
            branch.tune()
            note(method, sparsity, branch)
    for method, kinds in (("iterative", BOTH), ("iterative, convolutions", CONVOLUTIONS)):
        branch = copy.deepcopy(dense)
        for sparsity in SPARSITIES:
            threshold(branch.model, kinds, sparsity)
            branch.tune()
            note(method, sparsity, branch, kept=True)
    steps = setting.epochs * math.ceil(setting.train / setting.batch)
    for sparsity in SPARSITIES:
        begun = script()
        x, y, _, _ = splits
        batches = list(zip(x.split(setting.batch), y.split(setting.batch), strict=True))[:10]
        prune(begun.model, partial(snip, batches=batches, loss=F.cross_entropy), sparsity=sparsity)
        begun.train(setting.epochs)
        note("SNIP", sparsity, begun)
        begun = script()
        rigl = RigL(
            begun.model,
            begun.optimizer,
            sparsity=sparsity,
            end_step=3 * steps // 4,
            update_every=max(1, steps // 24),
            seed=seed,
        )
        begun.train(setting.epochs, after=rigl.step)
        note("RigL", sparsity, begun)
        begun = script()
        gradual = Gradual(
            begun.model,
            sparsity=sparsity,
            begin_step=steps // 5,
            end_step=3 * steps // 4,
            update_every=max(1, steps // 40),
        )
        begun.train(setting.epochs, after=lambda _, gradual=gradual: gradual.step())
        note("GMP", sparsity, begun)
    return rows


def read(path: Path) -> list[Row]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                r["space"],
                r["optimizer"],
                r["method"],
                float(r["sparsity"]),
                int(r["seed"]),
                float(r["accuracy"]),
                r["kept"],
            )
            for r in csv.DictReader(file)
        ]


def write(path: Path, rows: list[Row]) -> None:
    """All rows, in an order that does not depend on when they came."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    key = lambda row: (SPACES.index(row.space), OPTIMIZERS.index(row.optimizer), row.seed)  # noqa: E731
    for row in sorted(rows, key=key):
        writer.writerow({**asdict(row), "accuracy": f"{row.accuracy:.4f}"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue())


def study(args: argparse.Namespace, path: Path) -> None:
    """Run the cells that are not there yet."""
    rows = read(path)
    done = {(row.space, row.optimizer, row.seed) for row in rows}
    cells = [(s, o, seed) for seed in args.seeds for o in args.optimizers for s in args.spaces]
    cells = [each for each in cells if each not in done]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(cell, args.task, args.data, *each, args.test): each for each in cells}
        for number, future in enumerate(as_completed(running), 1):
            rows += future.result()
            write(path, rows)
            print(f"{number} of {len(cells)}: {running[future]}", flush=True)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of the plain 95 % interval."""
    from scipy import stats

    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    return mean, float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)


def table(rows: list[Row]) -> None:
    """Differences to ordinary pruning: by optimizer and method, the worst cell, and what the rules say."""
    found = {(r.space, r.optimizer, r.method, r.sparsity, r.seed): r.accuracy for r in rows}
    differences: dict[str, dict[tuple[str, str, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for (space, optimizer, method, sparsity, seed), accuracy in found.items():
        plain = found.get(("SP", optimizer, method, sparsity, seed))
        if space != "SP" and plain is not None:
            differences[space][optimizer, method, sparsity].append(accuracy - plain)
    for space, cells in differences.items():
        pruned = {key: values for key, values in cells.items() if key[1] != "dense"}
        means = {key: interval(values) for key, values in pruned.items()}
        by_seed = [sum(v) / len(v) for v in zip(*pruned.values(), strict=False)]
        pooled, half = interval(by_seed)
        print(f"\n{space}: pooled {pooled:+.2f} ± {half:.2f} over {len(pruned)} cells of {len(by_seed)} seeds")
        for optimizer in OPTIMIZERS:
            ofs = [mean for (o, _, _), (mean, _) in means.items() if o == optimizer]
            dense = cells.get((optimizer, "dense", 0.0))
            if ofs:
                start = "" if dense is None else f", dense {interval(dense)[0]:+.2f}"
                print(f"  {optimizer}: mean {sum(ofs) / len(ofs):+.2f}, worst {min(ofs):+.2f}{start}")
        for (optimizer, method, sparsity), (mean, width) in sorted(means.items(), key=lambda item: item[1][0]):
            if mean < -2:
                verdict = "FAILS" if mean < -5 else "includes 0" if mean + width > 0 else "TO REPEAT"
                print(f"    {optimizer}, {method} at {sparsity:.0%}: {mean:+.2f} ± {width:.2f} {verdict}")


def kept_table(rows: list[Row], optimizer: str) -> None:
    """Share of each layer that iterative pruning with one threshold keeps, in percent, mean over the seeds."""
    found: dict[tuple[float, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.optimizer == optimizer and row.method == "iterative":
            for layer, share in json.loads(row.kept).items():
                found[row.sparsity, row.space][layer].append(100 * share)
    for (sparsity, space), by_layer in sorted(found.items(), key=lambda item: (item[0][0], SPACES.index(item[0][1]))):
        shares = ", ".join(f"{layer}: {sum(values) / len(values):.1f}" for layer, values in by_layer.items())
        print(f"{sparsity:.0%} {space}: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    listed = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("task", choices=SETTINGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--spaces", type=listed, default=SPACES)
    parser.add_argument("--optimizers", type=listed, default=OPTIMIZERS)
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=tuple(range(6)))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--test", action="store_true", help="measure on the test images: once, after everything is chosen"
    )
    parser.add_argument("--table", action="store_true", help="show what is there")
    parser.add_argument("--kept", choices=OPTIMIZERS, help="show what each layer keeps under an optimizer")
    args = parser.parse_args()
    path = args.folder / f"{args.task}{'-test' if args.test else ''}.csv"
    if args.kept:
        kept_table(read(path), args.kept)
    elif args.table:
        table(read(path))
    else:
        study(args, path)


if __name__ == "__main__":
    main()
