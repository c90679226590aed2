"""Made-up results of a study with every part of a record, so that reports are tested without training."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from ip_plugin.compare.analysis import RUN, Analysis

LAYERS = {"0": 288, "3": 18432, "7": 36864, "12": 640}


def results(
    criteria: tuple[str, ...] = ("torch:random", "torch:l1", "torch:l1+shuffled"),
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98),
    spaces: tuple[str, ...] = ("spatial", "interspace"),
    seeds: int = 6,
    effect: float = 1.0,
) -> dict[str, Any]:
    """Arguments of `Analysis`; the interspace gains `effect` points where little is left."""
    random = np.random.default_rng(0)
    study = SimpleNamespace(criteria=criteria, sparsities=sparsities, spaces=spaces, seeds=tuple(range(seeds)))
    runs, curves, density, bases = [], [], [], {}
    by_seed = random.normal(0, 0.3, seeds)
    total = sum(LAYERS.values())
    for (criterion, sparsity), seed, space in product(
        [("dense", 0.0), *product(criteria, sparsities)], range(seeds), spaces
    ):
        inter, key = space != "spatial", (criterion, sparsity, space, seed)
        loss = 400 * max(sparsity - 0.85, 0) ** 2 * (1 + criteria.index(criterion) if criterion in criteria else 0)
        loss *= 3 if criterion.endswith("+shuffled") else 1
        accuracy = (
            98.5 - loss + by_seed[seed] + random.normal(0, 0.2) + inter * effect * (0.2 + 10 * max(sparsity - 0.85, 0))
        )
        kept = round((1 - sparsity) * total)
        runs.append({
            **dict(zip(RUN, key, strict=True)), "accuracy": round(accuracy * 8.99) / 8.99,
            "accuracy_before_pruning": 98.6 if criterion.startswith("torch:l1") else None, "parameters": total,
            "parameters_left": kept, "basis_parameters": 81 * inter,
            "spatial_layers": "0" if inter and sparsity == 0.98 else "", "seconds": 4.2, "macs": 1788544,
            "macs_left": round(1788544 * (1 - sparsity) * (1.3 if inter else 1.0)),
            "file_bytes": 4 * kept + 900 + 400 * inter, "lr": 0.15,
        })  # fmt: skip
        for epoch in range(1, 9):
            curves.append((*key, epoch, "train" if epoch < 6 else "finetune", 2.3 * 0.6**epoch + 0.01 * random.random(),
                           0.15 * (9 - epoch) / 8, accuracy - 30 * 0.5**epoch, 0.5 * epoch))  # fmt: skip
        density += [(*key, layer, min(1.0, (1 - sparsity) * factor)) for layer, factor in zip(LAYERS, (4, 2, 0.7, 3))]
        if inter:
            matrix = np.linalg.qr(random.normal(size=(9, 9)))[0] + 0.1 * random.normal(size=(9, 9))
            bases[key] = {"0": matrix.round(5).tolist()}
    return {
        "study": study, "results": pd.DataFrame(runs),
        "curves": pd.DataFrame(curves, columns=[*RUN, "epoch", "phase", "loss", "lr", "accuracy", "seconds"]),
        "density": pd.DataFrame(density, columns=[*RUN, "layer", "density"]), "bases": bases,
    }  # fmt: skip


def analysis(**options: Any) -> Analysis:
    """The analysis of made-up results."""
    return Analysis(**results(**options))
