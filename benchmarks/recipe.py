"""The README's recipe, `ip-plugin compare`, on images held out of the training images, for several kinds of bases.

    python benchmarks/recipe.py recipe-study            # runs what is missing, and shows the differences
    python benchmarks/recipe.py recipe-study --cells unit-standard-layer,unit-standard-model

A cell is constraint-basis-sharing. The held-out images, a half of the training images, stand in for the test images.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from scipy import stats
from torch.utils.data import TensorDataset

from ip_plugin.compare import Study, run
from ip_plugin.compare.config import Data
from ip_plugin.compare.data import Split, load

TODAY = "none-orthonormal-model"
CELLS = (
    TODAY, "unit-orthonormal-model", "unit-standard-layer", "unit-standard-model", "orthonormal-standard-layer",
    "orthonormal-standard-model", "orthonormal-orthonormal-model", "unit-dct-model", "unit-dct-layer",
)  # fmt: skip


def held_out() -> tuple[TensorDataset, TensorDataset]:
    """Two halves of the training images of scikit-learn's digits."""
    train = load(Data()).train
    assert isinstance(train, Split)
    first, second = (TensorDataset(train.images[start::2], train.labels[start::2]) for start in (0, 1))
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=lambda text: tuple(text.split(",")), default=CELLS)
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=tuple(range(6)))
    args = parser.parse_args()
    for cell in args.cells:
        constraint, basis, sharing = cell.split("-")
        space = f"interspace(basis={basis}, sharing={sharing}, constraint={constraint})"
        study = Study(
            data={"source": f"{__file__}:held_out"},
            spaces=("spatial", space) if cell == TODAY else (space,),
            seeds=args.seeds,
        )
        run(study, args.folder / cell)
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for cell in CELLS:
        path = args.folder / cell / "results.csv"
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    key = row["criterion"], row["sparsity"], row["seed"]
                    found["SP" if row["space"] == "spatial" else cell][key] = float(row["accuracy"])
    for cell, accuracies in found.items():
        for against in (TODAY, "SP"):
            if cell != against:
                show(cell, against, accuracies, found[against])


def show(
    cell: str, against: str, accuracies: dict[tuple[str, ...], float], others: dict[tuple[str, ...], float]
) -> None:
    """Differences in points, mean and 95 % interval over the seeds: of all cells together, and of each."""
    by_seed, by_cell = defaultdict(list), defaultdict(list)
    for key, accuracy in accuracies.items():
        by_seed[key[2]].append(accuracy - others[key])
        by_cell[key[:2]].append(accuracy - others[key])
    pooled = [sum(values) / len(values) for values in by_seed.values()]
    print(f"{cell} - {against}: {interval(pooled)}")
    for (criterion, sparsity), values in by_cell.items():
        print(f"    {criterion} at {float(sparsity):.0%}: {interval(values)}")


def interval(values: list[float]) -> str:
    found = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return f"{sum(values) / len(values):+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


if __name__ == "__main__":
    main()
