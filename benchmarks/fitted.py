"""What fitted bases and reconstruction bring to trained networks, without and with a short fine-tuning.

    python benchmarks/fitted.py cifar10.npz fitted-study

Trains small VGGs on CIFAR-10, prunes each in every way at every sparsity, and writes ``results.csv``: accuracies
in percent, before and after fine-tuning. Equal sparsity is equally many numbers left, those of the basis included. A
study that was stopped goes on where it was; the networks lie beside the results. Data is a thousand of the training
images without their labels.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from trained import trained

from ip_plugin import prunable, report
from ip_plugin.compare import Study
from ip_plugin.compare.cell import images_of
from ip_plugin.compare.data import Augmented, Images
from ip_plugin.compare.models import NETWORKS
from ip_plugin.compare.training import Training, accuracy
from ip_plugin.errors import LayerCollapseWarning
from ip_plugin.methods import Batches, lamp, magnitude, prune, prune_fitted, reconstruct, reestimate_batch_norm
from ip_plugin.methods.schedules import Score
from ip_plugin.utils.atomic import write_whole

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TRAINED_ON, TUNED_ON = 25_000, 5_000
ROUNDS = 4


@dataclass(frozen=True)
class Row:
    """One network, pruned in one way."""

    seed: int
    sparsity: float
    variant: str
    dense: float
    pruned: float
    finetuned: float
    numbers: int
    seconds: float


def spatial(model: nn.Module, score: Score, sparsity: float, batches: Batches | None) -> None:
    """Ordinary pruning, with the same reconstruction as `prune_fitted` if there is data."""
    if batches is None:
        prune(model, score, sparsity=sparsity, min_per_layer=1)
        return
    dense = copy.deepcopy(model)
    prune(
        model,
        score,
        sparsity=sparsity,
        min_per_layer=1,
        rounds=ROUNDS,
        after_round=lambda: reconstruct(model, dense, batches),
    )
    reestimate_batch_norm(model, batches)


def fitted(
    model: nn.Module, score: Score, sparsity: float, batches: Batches | None, *, orthonormal: bool = False
) -> None:
    """In one fitted basis for the network, whose numbers count; it is held while fine-tuning."""
    size = _size(model)
    kept = size - round(sparsity * size) - 81
    rounds = ROUNDS if batches else 1
    prune_fitted(
        model,
        sparsity=1 - kept / size,
        min_per_layer=1,
        score=score,
        batches=batches,
        rounds=rounds,
        orthonormal=orthonormal,
    )


ortho = partial(fitted, orthonormal=True)

#: Name -> (how, score, whether with data).
VARIANTS: dict[str, tuple[Callable[[nn.Module, Score, float, Batches | None], None], Score, bool]] = {
    "SP magnitude": (spatial, magnitude, False),
    "orthonormal magnitude": (ortho, magnitude, False),
    "fitted magnitude": (fitted, magnitude, False),
    "SP LAMP": (spatial, lamp, False),
    "orthonormal LAMP": (ortho, lamp, False),
    "fitted LAMP": (fitted, lamp, False),
    "SP LAMP, data": (spatial, lamp, True),
    "orthonormal LAMP, data": (ortho, lamp, True),
    "fitted LAMP, data": (fitted, lamp, True),
}


def _size(model: nn.Module) -> int:
    return sum(getattr(*target).numel() for target in prunable(model))


def dense_network(seed: int, folder: Path, study: Study, images: Images) -> nn.Module:
    """A trained network; read from the folder if it is there."""
    torch.manual_seed(seed)
    return trained(NETWORKS["vgg"](3, 10), folder / f"dense_{seed}.pt", study, images, seed)


def read(path: Path) -> list[Row]:
    """The rows of a ``results.csv``; none if it is not there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        kinds = {"seed": int, "variant": str, "numbers": int}
        return [Row(**{n: kinds.get(n, float)(v) for n, v in line.items()}) for line in csv.DictReader(file)]


def written(rows: list[Row]) -> str:
    """Rows as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(Row.__annotations__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10 as `ip-plugin compare --data` takes it")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", LayerCollapseWarning)
    data = {"source": arguments.data, "train_images": TRAINED_ON, "augment": ("RandomHorizontalFlip",)}
    study = Study(data=data, training={"epochs": 10, "finetune_epochs": 1})
    images = images_of(study)
    train, test = images.train, images.test
    assert isinstance(train, Augmented)
    part = [tensor[:TUNED_ON] for tensor in (train.images, train.labels, train.raw)]
    few = replace(images, train=Augmented(*part, train.augmentation, train.normalise))
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = read(arguments.output / "results.csv")
    done = {(row.seed, row.sparsity, row.variant) for row in rows}
    for seed in arguments.seeds:
        dense = dense_network(seed, arguments.output, study, images)
        before = accuracy(dense, test)
        for sparsity in reversed(SPARSITIES):
            for name, (how, score, data) in VARIANTS.items():
                if (seed, sparsity, name) in done:
                    continue
                started = time.perf_counter()
                model = copy.deepcopy(dense)
                training = Training(model, few, study.training, seed)
                how(model, score, sparsity, training.batches(10) if data else None)
                seconds = time.perf_counter() - started
                pruned = accuracy(model, test)
                left = report(model).prunable
                training.finetune()
                numbers = left.nonzeros + left.basis_parameters
                row = Row(seed, sparsity, name, before, pruned, accuracy(model, test), numbers, round(seconds, 2))
                rows.append(row)
                write_whole(arguments.output / "results.csv", written(rows))
                print(row, flush=True)


if __name__ == "__main__":
    main()
