"""Pruned linear layers as sparse networks run them, beside torch: how many times faster.

    python benchmarks/sparse_linear.py

Both are timed in turn, and 8 MB of other memory are read in between, as a network would. In brackets how each layer was
run: by torch, or by its non-zeros, so many rows at a time. Run it with nothing else running.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse.autotune import Autotuner
from ip_plugin.sparse.graph import baked, trace
from ip_plugin.sparse.lowering import lower

SIZES = ((512, 1000), (2048, 1000), (768, 3072))
ROWS = (1, 4, 16, 64, 200, 784)
SPARSITIES = (0.75, 0.8, 0.85, 0.9, 0.95)
ROUNDS = 25


def milliseconds(calls: list[Callable[[], object]]) -> list[float]:
    """Medians of each of several functions."""
    other_memory, took = torch.ones(2_000_000), [[0.0] * ROUNDS for _ in calls]
    for turn in range(ROUNDS):
        for times, call in zip(took, calls, strict=True):
            other_memory.sum()
            began = time.perf_counter()
            call()
            times[turn] = 1e3 * (time.perf_counter() - began)
    return [statistics.median(times) for times in took]


def compared(inputs: int, outputs: int, rows: int, sparsity: float) -> str:
    """How many times faster a pruned layer is than torch's, and how it is run."""
    torch.manual_seed(0)
    layer, values = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    model = nn.Sequential(layer).eval()
    apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer"))
    program = lower(trace(*baked(model), (values,)).module, (values,), Autotuner())
    weight, bias = layer.weight.detach(), layer.bias
    sparse, dense = milliseconds([lambda: program((values,)), lambda: nn.functional.linear(values, weight, bias)])
    runs = [step.layer.run.width for step in program.steps if step.layer is not None]
    return f"{dense / sparse:.2f} ({runs[0] or 'torch'})"


def main() -> None:
    torch.set_num_threads(2)
    print(f"torch {torch.__version__}, 2 threads; sparsities", *SPARSITIES, sep="  ")
    with torch.no_grad():
        for inputs, outputs in SIZES:
            for rows in ROWS:
                cells = (compared(inputs, outputs, rows, sparsity) for sparsity in SPARSITIES)
                print(f"{inputs} to {outputs}, {rows} rows:", *cells, sep="  ", flush=True)


if __name__ == "__main__":
    main()
