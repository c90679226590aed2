"""Ways to run a convolution that are about as fast alone are compared in the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("numba")

from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import SparseNetwork
from ip_plugin.sparse.autotune import Autotuner
from ip_plugin.sparse.graph import baked, trace
from ip_plugin.sparse.kernels import images as image_loops
from ip_plugin.sparse.kernels import nonzero


def _timer(others: float) -> Callable[[Sequence[Any]], list[float]]:
    """The fused loop is the fastest one alone; the direct loop takes so many times as long."""

    def seconds(runs: Sequence[Any]) -> list[float]:
        loops = [run.args[1] if hasattr(run, "func") and run.func.__name__ == "_both" else run for run in runs]
        names = [loop.func.__name__ if hasattr(loop, "func") else "dense" for loop in loops]
        first = names.index("fused")
        return [1.0 if number == first else others if name == "direct" else 9.0 for number, name in enumerate(names)]

    return seconds


@pytest.mark.parametrize(("others", "how"), [(1.2, "direct"), (2.0, "fused")])
@pytest.mark.parametrize("layers", [1, 4])
def test_the_way_that_is_fastest_in_the_network_is_taken_of_those_that_are_close(
    others: float, how: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused loop is the fastest one alone, says the timer, and slow in the network."""

    def slow(loop: Callable[..., None]) -> Callable[..., None]:
        def fused(*arguments: Any) -> None:
            time.sleep(0.003)
            loop(*arguments)

        return fused

    monkeypatch.setattr(nonzero, "fused", slow(nonzero.fused))
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers)))
    apply_masks(model, select(magnitude(model), sparsity=0.9, scope="layer")).eval()
    images = torch.randn(1, 8, 11, 11)
    network = SparseNetwork(trace(*baked(model), (images,)), Autotuner(timer=_timer(others)))
    torch.testing.assert_close(network(images), model(images).detach(), rtol=1e-4, atol=1e-5)
    assert [run.how for run in network.runs(images)] == [how] * layers


def test_a_pooling_behind_a_convolution_counts_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling takes longer behind the fused loop than that saves."""
    ran = []

    def noted(loop: Callable[..., None], seconds: float = 0) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            time.sleep(seconds)
            ran.append(run.__name__)
            loop(*arguments)

        run.__name__ = loop.__name__
        return run

    def max_pool(*arguments: Any, pool: Callable[..., None] = image_loops.max_pool) -> None:
        time.sleep(0.006 if ran[-1] == "fused" else 0)
        pool(*arguments)

    monkeypatch.setattr(nonzero, "fused", noted(nonzero.fused))
    monkeypatch.setattr(nonzero, "direct", noted(nonzero.direct, 0.002))
    monkeypatch.setattr(image_loops, "max_pool", max_pool)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2))
    apply_masks(model, select(magnitude(model), sparsity=0.9, scope="layer")).eval()
    images = torch.randn(1, 8, 12, 12)
    network = SparseNetwork(trace(*baked(model), (images,)), Autotuner(timer=_timer(1.2)))
    torch.testing.assert_close(network(images), model(images).detach(), rtol=1e-4, atol=1e-5)
    assert [run.how for run in network.runs(images)] == ["direct"]
