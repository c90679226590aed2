"""What the results of a study say, as pandas tables: read by the console, the report, the README and Python users."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from ip_plugin.adapters import VARIED

from .config import DENSE
from .controls import CONTROLS
from .statistics import ENOUGH_SEEDS, LEVEL, bootstrap, family_weights, holm, mean, paired, std

#: What identifies a cell of the grid, and a run.
KEYS = ["criterion", "sparsity", "space"]
RUN = [*KEYS, "seed"]
SPATIAL = "spatial"
#: Suffixes of criteria that make a pair with the criterion without them.
SUFFIXES = (*CONTROLS, VARIED)

_NUMBERS = (
    "accuracy", "accuracy_before_pruning", "validation_accuracy", "parameters", "parameters_left", "basis_parameters",
    "seconds", "macs", "macs_left", "file_bytes", "latency_ms", "dense_latency_ms", "lr",
)  # fmt: skip
_PAIR = ["comparison", *RUN, "first", "second", "difference"]
_DIFFERENCE = ["count", "mean", "std", "low", "high", "p"]


class Analysis:
    """The results of a study and what they say, in tidy tables.

    Accuracies are in percent, differences in points. ``count`` is the number of seeds or of pairs; ``std`` the sample
    standard deviation over seeds, NaN for one; ``low`` and ``high`` a 95 % t interval of the mean; ``p`` of a two-sided
    paired t-test; ``p_holm`` the same, corrected for all tests of the study by Holm's method: overall effects, cells,
    controls overall, and cells of controls (``family``) share the level of 5 % equally. ``significant`` is
    ``p_holm <= 0.05``, and nothing else.

    Comparisons, each a second run minus a first one of equal seed:
    ``space``, an interspace minus spatial; ``shuffled``, ``reinit`` and ``variety``, a criterion with that suffix minus
    the criterion without it; ``frozen``, the interspace with a frozen basis minus the same with a trained one.

    Args:
        study: has the axes of the grid, for the order of rows and for what has not been run yet; None takes both from
            the results.
        results: one row for each run; missing columns count as not measured.
        curves: training curves, one row for each run and epoch.
        density: share of entries kept, one row for each run and layer.
        bases: of each run (criterion, sparsity, space, seed), the bases after training by the first layer's name.
        margin: points of accuracy; a cell whose mean difference is within it counts as a tie.
        made: versions and machine with which the results were made.
        failures: tracebacks of the runs that failed.

    Attributes:
        results: one row for each cell that has been run, in the order of the study.
        accuracy: over the seeds, by criterion, sparsity and space.
        pairs: of every comparison and run, the accuracies ``first`` and ``second`` and their ``difference``.
        differences: those over the seeds, by comparison, criterion, sparsity and space. For ``space``, ``beyond_dense``
            (with ``beyond_low``, ``beyond_high``) is the difference minus that of the dense networks.
        overall: by comparison and space, over the seeds that have all cells: mean over criteria of the mean over
            sparsities (dense networks and controls left out of ``space``); ``better`` is the share of pairs in which
            the second is more accurate, a tie counting half; ``boot_low`` to ``boot_high`` and ``better_low`` to
            ``better_high`` are bootstrap intervals over seeds, stratified by criterion, from six seeds on;
            ``wins``, ``ties`` and ``losses`` count cells by their mean difference and `margin`.
        costs: bytes, multiply-adds, parameters and latencies over the seeds, by criterion, sparsity and space;
            ``speedup`` is that of each run, dense latency over pruned.
        curves, density, bases, made, failures: as given; empty where there are none.

    >>> rows = [("torch:l1", 0.9, space, seed, 90.0 + (space == "interspace") * (1 + seed % 2))
    ...         for space in ("spatial", "interspace") for seed in range(6)]
    >>> analysis = Analysis(None, pd.DataFrame(rows, columns=["criterion", "sparsity", "space", "seed", "accuracy"]))
    >>> analysis.differences.loc[("space", "torch:l1", 0.9, "interspace"), ["mean", "low", "high"]].round(2).tolist()
    [1.5, 0.93, 2.07]
    """

    def __init__(
        self,
        study: Any,
        results: pd.DataFrame,
        curves: pd.DataFrame | None = None,
        density: pd.DataFrame | None = None,
        bases: Mapping[Any, Mapping[str, Any]] | None = None,
        *,
        margin: float = 0.5,
        made: Mapping[str, str] | None = None,
        failures: Mapping[Any, str] | None = None,
    ) -> None:
        self.study = study
        self.margin = margin
        self.made, self.failures = dict(made or {}), dict(failures or {})
        axes = {name: getattr(study, plural, ()) for name, plural in zip(RUN, _PLURAL, strict=True)}
        self.results = runs = _ordered(results, axes)
        self.criteria = [c for c in _axis(axes["criterion"], runs["criterion"]) if c != DENSE]
        self.sparsities = [float(s) for s in _axis(axes["sparsity"], runs.loc[runs["criterion"] != DENSE, "sparsity"])]
        self.spaces: list[str] = _axis(axes["space"], runs["space"])
        self.seeds: list[int] = _axis(axes["seed"], runs["seed"])
        self.curves = _empty([*RUN, "epoch", "phase", "loss", "lr", "accuracy"]) if curves is None else curves
        self.density = _empty([*RUN, "layer", "density"]) if density is None else density
        self.bases = bases or {}

        cells = [*product(self.criteria, self.sparsities)]
        if DENSE in set(runs["criterion"]):
            cells = [(DENSE, 0.0), *cells]
        grid = pd.MultiIndex.from_tuples([(*cell, space) for cell in cells for space in self.spaces], names=KEYS)
        self.accuracy = _over_seeds(runs.set_index(KEYS)["accuracy"], KEYS).reindex(grid)

        self.pairs = _pairs(runs, self.spaces)
        self.differences, self.overall = self._compared(cells)

        costs = runs.assign(speedup=runs["dense_latency_ms"] / runs["latency_ms"]).set_index(KEYS)
        names = ["parameters_left", "macs_left", "file_bytes", "latency_ms", "dense_latency_ms", "speedup"]
        self.costs = costs[names].groupby(level=KEYS, sort=False).agg(["mean", "std"]).reindex(grid)

    @property
    def interspaces(self) -> list[str]:
        """The values of the axis of spaces that are not spatial."""
        return [space for space in self.spaces if space != SPATIAL]

    def label(self, space: str) -> str:
        """The short name of a space: SP and IP, and IP with its settings where there are several.

        >>> Analysis(None, pd.DataFrame(columns=RUN)).label("interspace(basis=dct)")
        'IP(basis=dct)'
        """
        if space == SPATIAL:
            return "SP"
        return "IP" if len(self.interspaces) == 1 else space.replace("interspace", "IP")

    def missing(self) -> int:
        """How many cells of the study have no result."""
        return max(len(self.accuracy) * len(self.seeds) - len(self.results), 0)

    def _compared(self, cells: list[tuple[str, float]]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The frames `differences` and `overall`, corrected for each other."""
        keys = ["comparison", *KEYS]
        matrix = self.pairs.pivot(index=keys, columns="seed", values="difference").reindex(
            pd.MultiIndex.from_frame(self.pairs[keys].drop_duplicates())
        )
        if SPATIAL in self.spaces:  # cells without a pair are shown, too
            grid = [("space", *cell, space) for cell in cells for space in self.interspaces]
            rest = [key for key in matrix.index if key[0] != "space"]
            matrix = matrix.reindex(pd.MultiIndex.from_tuples([*grid, *rest], names=keys))
        by_cell = pd.DataFrame(vars(paired(matrix.to_numpy(float))), index=matrix.index)
        arms = self.pairs.groupby(keys, sort=False)[["first", "second"]].agg(mean)
        by_cell = arms.reindex(by_cell.index).join(by_cell)
        by_cell["family"] = ["cells" if _is_cell(*key) else "control cells" for key in by_cell.index]
        by_cell[_BEYOND] = _beyond_dense(matrix)

        used = [key for key in matrix.index if (_is_cell(*key) and key[1] != DENSE) or key[0] != "space"]
        groups = matrix.loc[used].groupby(level=["comparison", "space"], sort=False)
        rows = {}
        for key, group in groups:
            dense = matrix[[row[:2] == ("space", DENSE) and (row[0], row[3]) == key for row in matrix.index]]
            rows[key] = _pooled(group, dense, by_cell.loc[group.index, "mean"], self.margin)
        names = pd.MultiIndex.from_tuples(rows, names=["comparison", "space"]) if rows else None
        overall = pd.DataFrame(list(rows.values()), index=names, columns=_POOLED)
        overall["family"] = ["overall" if key[0] == "space" else "controls" for key in overall.index]

        tests = pd.concat([overall[["count", "p", "family"]], by_cell[["count", "p", "family"]]], ignore_index=True)
        tested = tests["count"] >= 2
        tests.loc[tested, "p_holm"] = holm(tests.loc[tested, "p"], family_weights(list(tests.loc[tested, "family"])))
        for frame, corrected in ((overall, tests[: len(overall)]), (by_cell, tests[len(overall) :])):
            frame["p_holm"] = corrected["p_holm"].to_numpy(float)
            frame["significant"] = frame["p_holm"] <= LEVEL
        return by_cell, overall


_PLURAL = ("criteria", "sparsities", "spaces", "seeds")
_BEYOND = ["beyond_dense", "beyond_low", "beyond_high"]
_POOLED = [
    *_DIFFERENCE, *_BEYOND, "cells", "boot_low", "boot_high", "better", "better_low", "better_high", "wins", "ties",
    "losses",
]  # fmt: skip


def is_control(criterion: str) -> bool:
    """Whether a criterion is a control: it says why another one works.

    >>> is_control("torch:l1+shuffled"), is_control("tp:l1+variety")
    (True, False)
    """
    return criterion.endswith(tuple(CONTROLS))


def is_frozen(space: str) -> bool:
    """Whether the bases of a space are never trained."""
    return "frozen=true" in space


def _is_cell(comparison: str, criterion: str, *_: object) -> bool:
    return comparison == "space" and not is_control(criterion)


def _empty(columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(columns=columns)


def _axis(declared: Iterable[Any], run: pd.Series) -> list[Any]:
    """The values of an axis: those of the study in its order; without a study, those that have been run."""
    return list(declared) or list(dict.fromkeys(run))


def _ordered(results: pd.DataFrame, axes: dict[str, Sequence[Any]]) -> pd.DataFrame:
    """The runs of the grid in the order of the study, with every column."""
    frame = results.reindex(columns=[*results.columns, *(c for c in (*RUN, *_NUMBERS) if c not in results)])
    frame = frame.astype(dict.fromkeys(("sparsity", *_NUMBERS), float)).dropna(subset="accuracy")
    inside, dense = pd.Series(True, index=frame.index), frame["criterion"] == DENSE
    order = pd.DataFrame(index=frame.index)
    for name, declared in axes.items():
        default = sorted(set(frame[name])) if name in ("sparsity", "seed") else dict.fromkeys(frame[name])
        places = {value: place for place, value in enumerate(declared or default)}
        order[name] = frame[name].map(places)
        if name in ("criterion", "sparsity"):
            order[name] = order[name].where(~dense, -1)
        inside &= order[name].notna()
    return frame.loc[order[inside].sort_values(RUN).index].reset_index(drop=True)


def _over_seeds(values: pd.Series, keys: list[str]) -> pd.DataFrame:
    """Mean, standard deviation, count and the t interval of the mean."""
    groups = values.groupby(level=keys, sort=False)
    frame = groups.agg([mean, std, "count"]) if len(values) else _empty(["mean", "std", "count"]).astype(float)
    matrix = [group.to_numpy(float) for _, group in groups]
    intervals = [paired(row) for row in matrix]
    frame["low"] = [float(interval.low) for interval in intervals]
    frame["high"] = [float(interval.high) for interval in intervals]
    return frame


def _pairs(runs: pd.DataFrame, spaces: list[str]) -> pd.DataFrame:
    """Every pair of every comparison, one way: runs that agree in all but one thing."""
    made = []

    def pair(comparison: str, first: pd.DataFrame, second: pd.DataFrame) -> None:
        sides = [rows[[*RUN, "accuracy"]].rename(columns={"accuracy": name}) for rows, name in
                 ((second, "second"), (first, "first"))]  # fmt: skip
        both = sides[0].merge(sides[1], on=RUN)
        made.append(both.assign(comparison=comparison, difference=both["second"] - both["first"])[_PAIR])

    spatial = runs[runs["space"] == SPATIAL]
    for space in spaces:
        inside = runs[runs["space"] == space]
        if space != SPATIAL:
            pair("space", spatial.assign(space=space), inside)
        if is_frozen(space):
            pair("frozen", runs[runs["space"] == _thawed(space)], inside.assign(space=_thawed(space)))
    for suffix in SUFFIXES:
        name = runs["criterion"]
        with_it = runs[name.str.endswith(suffix).astype(bool)]
        without = with_it["criterion"].str.removesuffix(suffix)
        pair(suffix[1:], runs[name.isin(set(without))], with_it.assign(criterion=without))
    return pd.concat([frame for frame in made if len(frame)] or [_empty(_PAIR)], ignore_index=True)


def _thawed(space: str) -> str:
    """The space whose bases are trained, and which is the same otherwise.

    >>> _thawed("interspace(basis=dct, frozen=true)"), _thawed("interspace(frozen=true)")
    ('interspace(basis=dct)', 'interspace')
    """
    return re.sub(r",?\s*frozen=true", "", space).replace("()", "").replace("(, ", "(")


def _beyond_dense(matrix: pd.DataFrame) -> np.ndarray[Any, Any]:
    """For every cell of a comparison of spaces: mean and interval of its differences minus the dense networks'."""
    dense = {key[3]: row for key, row in matrix.iterrows() if key[:2] == ("space", DENSE)}
    nothing = np.full(matrix.shape[1], np.nan)
    rows = [
        row - dense.get(key[3], nothing) if key[0] == "space" and key[1] != DENSE else nothing
        for key, row in matrix.iterrows()
    ]
    return np.stack(_interval(np.array(rows, dtype=float).reshape(matrix.shape)), axis=1)


def _pooled(matrix: pd.DataFrame, dense: pd.DataFrame, means: pd.Series, margin: float) -> list[float]:
    """One row of `overall` from the differences of its cells, cells by seeds, and those of the dense networks."""
    matrix = matrix.dropna(axis=0, how="all")
    complete = matrix.dropna(axis=1) if len(matrix) else matrix.iloc[:, :0]
    better = (complete > 0) + 0.5 * (complete == 0)
    effect, share = (frame.groupby(level="criterion", sort=False).mean() for frame in (complete, better))
    by_seed, seeds = effect.mean().to_numpy(float), complete.shape[1]
    beyond = by_seed - (dense[complete.columns].to_numpy(float)[0] if len(dense) else np.nan)
    intervals = [
        bootstrap(list(frame.to_numpy(float))) if seeds >= ENOUGH_SEEDS else (np.nan, np.nan)
        for frame in (effect, share)
    ]
    counts = [(means > margin).sum(), (means.abs() <= margin).sum(), (means < -margin).sum()]
    return [
        *vars(paired(by_seed)).values(), *_interval(beyond), len(complete), *intervals[0], share.mean().mean(),
        *intervals[1], *counts,
    ]  # fmt: skip


def _interval(differences: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    result = paired(differences)
    return result.mean, result.low, result.high
