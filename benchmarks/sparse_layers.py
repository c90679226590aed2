"""How much faster a sparse 3x3 convolution is than the fastest dense one of torch, layer by layer.

    python benchmarks/sparse_layers.py

Eight layers (64 to 512 channels, CIFAR and ImageNet shapes), batch 1 and 16, non-zeros at random places, the worst
case. Dense is the fastest of: torch's convolution on NCHW and on channels_last, oneDNN with weights packed beforehand,
and inductor; all take turns in one run, each called twice before it is timed, so that none pays for the caches that the
others have filled. The sparse convolution reads and writes the layout that activations have inside
of a sparse network. IP has an orthonormal basis; SP is the case without one. Printed are harmonic means.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from harness import side_by_side
from torch import Tensor

from ip_plugin.basis import bases
from ip_plugin.sparse.addressing import Addressing, Window
from ip_plugin.sparse.autotune import Autotuner
from ip_plugin.sparse.coefficients import Coefficients
from ip_plugin.sparse.convolution import Convolution
from ip_plugin.sparse.loops import Loop

SHAPES = [(64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7)]
WINDOW = Window((3, 3), padding=(1, 1))
#: The least that IP must reach, by sparsity.
GOALS = {0.9: 2.5, 0.95: 3.7, 0.98: 6.2, 0.99: 8.8}


def dense(channels: int, size: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Every dense way to run a layer."""
    images, weight = torch.randn(batch, channels, size, size), torch.randn(channels, channels, 3, 3)
    bias = torch.randn(channels)
    last, last_weight = (each.to(memory_format=torch.channels_last) for each in (images, weight))
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
        weight.to_mkldnn(), [1, 1], [1, 1], [1, 1], 1, list(images.shape)
    )
    pointwise = torch.ops.mkldnn._convolution_pointwise
    compiled = torch.compile(partial(F.conv2d, weight=weight, bias=bias, padding=1))
    return {
        "NCHW": partial(F.conv2d, images, weight, bias, padding=1),
        "channels_last": partial(F.conv2d, last, last_weight, bias, padding=1),
        "oneDNN, packed": partial(pointwise, last, packed, bias, [1, 1], [1, 1], [1, 1], 1, "none", [], ""),
        "inductor": partial(compiled, images),
    }


def sparse(
    channels: int, size: int, batch: int, sparsity: float, space: str, response_dtype: torch.dtype
) -> Callable[[], object] | None:
    """The sparse way, chosen by timing; None where dense was chosen."""
    values = torch.randn(channels, channels, 9) * (torch.rand(channels, channels, 9) >= sparsity)
    basis = bases.make("orthonormal", (3, 3)).float().numpy() if space == "IP" else None
    coefficients = Coefficients.of(values.numpy(), 1, basis)
    bias = np.zeros(channels, np.float32)
    addressing = Addressing.new(WINDOW, batch, size, size, gap=(1, 1))
    convolution = Convolution("layer", WINDOW, 1, channels, coefficients, bias)
    choice = Autotuner(response_dtype)(convolution, addressing, False)
    if choice is None:
        return None
    source, target = addressing.source.empty(channels), addressing.target.empty(channels)
    addressing.source.view(source, channels).normal_()
    return Loop(coefficients, bias, addressing, choice, (0.0, np.inf)).bind(source, target)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(GOALS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--bfloat16", action="store_true", help="store basis-filter responses in bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]  # one for each shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
    print(f"torch {torch.__version__}, {arguments.threads} threads; times faster than torch's fastest convolution\n")
    found: dict[tuple[str, float], list[float]] = {}
    for batch in arguments.batches:
        for channels, size in SHAPES:
            ways = dense(channels, size, batch)
            grid = [(space, s) for space in ("SP", "IP") for s in arguments.sparsities]
            cells = {(space, s): sparse(channels, size, batch, s, space, dtype) for space, s in grid}
            variants = {f"{space} {s:g}": run for (space, s), run in cells.items() if run is not None}
            baseline = ways.pop("oneDNN, packed")
            with torch.no_grad():
                ratios = side_by_side(baseline, {**ways, **variants}, rounds=arguments.rounds, untimed=2)
            best = min(1.0, *(ratios[name].ratio for name in ways))
            fastest = min(["oneDNN, packed", *ways], key=lambda name: ratios[name].ratio if name in ratios else 1.0)
            line = []
            for space, s in cells:
                ratio = ratios.get(f"{space} {s:g}")
                faster = 1.0 if ratio is None else best / ratio.ratio
                found.setdefault((space, s), []).append(faster)
                line.append(f"{space} {s:g}: {faster:5.2f}")
            milliseconds = next(iter(ratios.values())).baseline * best
            layer = f"{channels:3} channels, {size:2}x{size:<2}, batch {batch:2}"
            print(f"{layer}: {', '.join(line)}; dense {milliseconds:.2f} ms ({fastest})", flush=True)
    print()
    for (space, s), values in found.items():
        goal = f", at least {GOALS[s]}" if space == "IP" and s in GOALS else ""
        print(f"{space} at {s:g}: harmonic mean {statistics.harmonic_mean(values):.2f}{goal}")


if __name__ == "__main__":
    main()
