"""Pruned linear layers as sparse networks run them, beside torch: how many times faster.

    python benchmarks/sparse_linear.py

Both are timed in turn, and 8 MB of other memory are read in between, as a network would. In brackets how each layer was
run: by torch, or by its non-zeros, so many rows at a time. Run it with nothing else running.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import nn

from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse.autotune import Autotuner
from ip_plugin.sparse.graph import baked, trace
from ip_plugin.sparse.lowering import lower
from ip_plugin.utils.timing import side_by_side

SIZES = ((512, 1000), (2048, 1000), (768, 3072))
ROWS = (1, 4, 16, 64, 200, 784)
SPARSITIES = (0.75, 0.8, 0.85, 0.9, 0.95)


def compared(inputs: int, outputs: int, rows: int, sparsity: float) -> str:
    """How many times faster a pruned layer is than torch's, and how it is run."""
    torch.manual_seed(0)
    layer, values = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    model = nn.Sequential(layer).eval()
    apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer"))
    program = lower(trace(*baked(model), (values,)).module, (values,), Autotuner())
    weight, bias = layer.weight.detach(), layer.bias
    other_memory = torch.ones(2_000_000)
    calls = {
        "memory": other_memory.sum, "sparse": lambda: program((values,)),
        "memory again": other_memory.sum, "dense": lambda: nn.functional.linear(values, weight, bias),
    }  # fmt: skip
    took = side_by_side(calls, rounds=25)
    runs = [step.layer.run.width for step in program.steps if step.layer is not None]
    return f"{median(took['dense']) / median(took['sparse']):.2f} ({runs[0] or 'torch'})"


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
