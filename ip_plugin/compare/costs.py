"""What the networks of a study cost when they are deployed, over the seeds: bytes and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cell import Result
from .config import Run, Space, Study
from .deployment import ROUNDS, Deployment
from .spread import Spread


@dataclass(frozen=True)
class Cost:
    """One criterion at one sparsity in one space, over the seeds that have been measured.

    Attributes:
        criterion, sparsity, space: which.
        file_bytes: of the compact files.
        latency, dense_latency: of one image in milliseconds: pruned by `ip_plugin.sparse`, not pruned by torch.
        faster: how many times faster the pruned network is, of each run's own pair.
    """

    criterion: str
    sparsity: float
    space: Space
    file_bytes: Spread
    latency: Spread
    dense_latency: Spread
    faster: Spread


def costs(study: Study, results: Mapping[Run, Result]) -> list[Cost]:
    """Of every line of a study's table, by space; what has not been measured is left out."""
    found = []
    for criterion in study.criteria:
        for sparsity in study.sparsities:
            for space in study.spaces:
                runs = [Run(criterion, sparsity, space, seed) for seed in study.seeds]
                measured = [each for run in runs if run in results and (each := results[run].deployment) is not None]
                if measured:
                    found.append(_cost(criterion, sparsity, space, measured))
    return found


def _cost(criterion: str, sparsity: float, space: Space, measured: Sequence[Deployment]) -> Cost:
    spreads = (
        Spread.of(values)
        for values in (
            [each.file_bytes for each in measured],
            [each.latency for each in measured],
            [each.dense_latency for each in measured],
            [each.faster for each in measured],
        )
    )
    file_bytes, latency, dense_latency, faster = (spread for spread in spreads if spread is not None)
    return Cost(criterion, sparsity, space, file_bytes, latency, dense_latency, faster)


HEADERS = ("criterion", "sparsity", "space", "file KB", "sparse µs", "dense µs", "times faster")


def cells(cost: Cost) -> list[str]:
    """A cost as text, for a table; 1 KB are 1,000 bytes."""
    short = {"spatial": "SP", "interspace": "IP"}[cost.space]
    kilobytes, *microseconds = (
        spread.scaled(factor)
        for spread, factor in ((cost.file_bytes, 1e-3), (cost.latency, 1e3), (cost.dense_latency, 1e3))
    )
    latencies = [f"{each:,.0f}" for each in microseconds]
    return [cost.criterion, f"{cost.sparsity:.4g}", short, f"{kilobytes:,.1f}", *latencies, f"{cost.faster:.2f}"]


def title(study: Study) -> str:
    """What the table is of."""
    threads = study.settings.deploy_threads
    return f"Deployed: compact file, and latency of one image on the CPU with {threads} thread{'s' * (threads != 1)}"


def remarks(found: Sequence[Cost]) -> list[str]:
    """How it was measured, and where the pruned network is slower."""
    if not found:
        return []
    slower = [f"{each.criterion} at {each.sparsity:g}, {each.space}" for each in found if each.faster.mean < 1]
    return [
        f"Latencies are medians of {ROUNDS} calls: of the pruned network by ip_plugin.sparse, and in turns with it of "
        "the network that was not pruned, by torch as it is. Run sparse, the pruned network is slower in "
        f"{len(slower)} of {len(found)} lines{': ' + '; '.join(slower) if slower else ''}."
    ]
