"""Which way to run a convolution or a linear layer: chosen by a rule, or by timing once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .addressing import Addressing, Window
from .convolution import Convolution
from .images import Images, Packing
from .kernels import winograd
from .layout import WIDEST, Layout
from .linear import Linear
from .loops import Choice, Loop

#: How often each candidate is run.
_RUNS = 3
#: A way is taken instead of the one that the rule chooses if it takes less than this share of the time.
_CLEARLY = 0.95
#: So many others are kept, which took at most so many times the time: they are timed again in the network.
_OTHERS, _CLOSE = 4, 1.5
#: Below this density torch's way is not timed, which saves time; a guess.
_SPARSE = 0.02
#: Bytes of responses at a time: about a first-level cache, or parts of a second-level one.
_BUDGETS = (40_000, 80_000, 160_000, 320_000)
#: From this density on the rule runs a convolution dense.
_DENSE = 0.5
#: Below this density the rule sums up by columns where that is possible.
_COLUMNS = 0.1
#: So many non-zeros a column of an output channel's kernels must have on average, to be summed up by columns.
_FEW = 2
#: From this density on the rule runs a linear layer dense.
_LINEAR_DENSE = 0.15
#: So many rows of inputs a linear layer may multiply one by one; the rule lets it do so for one.
_FEW_ROWS = 4
#: From this density on, and with so many tiles, the rule runs a 3x3 convolution by Winograd's filtering.
_WINOGRAD, _WINOGRAD_TILES = 0.2, 8
#: From this density on Winograd's filtering is timed.
_WINOGRAD_TIMED = 0.08
#: Bytes of Winograd's filters at most (they take four times what dense kernels take), and of patches: about a
#: second-level cache.
_FILTERS, _PATCHES = 5_000_000, 1_500_000
#: How many numbers are read between two runs, by all threads: other layers' coefficients take second-level caches.
_OTHER_MEMORY = 2_000_000

Chooser = Callable[[Convolution | Linear, Addressing, bool, "Layout | None"], Choice | None]


def by_rule(
    layer: Convolution | Linear, addressing: Addressing, _packs: bool = False, _original: Layout | None = None,
    response_dtype: torch.dtype = torch.float32,
) -> Choice | None:  # fmt: skip
    """Choose how to run a layer by a rule, which is the same on every machine; arguments as of `Autotuner`."""
    if isinstance(layer, Linear):
        rows = addressing.target.pixels
        return _linear_choices(rows)[0 if rows == 1 else -1] if layer.density < _LINEAR_DENSE else None
    candidate = next(_winograd_choices(layer, addressing), None)
    if candidate and layer.density >= _WINOGRAD and _winograd_tiles(addressing) >= _WINOGRAD_TILES:
        return candidate._replace(parts=1)
    if layer.density >= _DENSE:
        return None
    if can_sum_columns(layer) and layer.density < _COLUMNS:
        for width in (64, WIDEST):
            if addressing.can_align(width):
                return Choice("columns", width)
    width = 64 if addressing.target.pixels > 32 else 32
    standard = layer.coefficients.basis is None
    if layer.depthwise or (standard and (layer.density < 0.03 or layer.groups > 1)):
        return Choice("direct", width)
    return Choice("fused", width, response_dtype=response_dtype)


class Autotuner:
    """Chooses how to run a layer by timing, and remembers it for layers of one kind.

    Args:
        response_dtype: dtype in which basis-filter responses are stored.
        timer: returns the seconds that each of several ways takes.
    """

    def __init__(
        self,
        response_dtype: torch.dtype = torch.float32,
        timer: Callable[[Sequence[Callable[[], object]]], Sequence[float]] | None = None,
    ) -> None:
        self._response_dtype, self._timer = response_dtype, timer
        self._known: dict[tuple[Any, ...], Choice | None] = {}

    def __call__(
        self, layer: Convolution | Linear, addressing: Addressing, packs: bool, original: Layout | None = None
    ) -> Choice | None:
        """How to run a layer; None: by torch.

        Args:
            layer, addressing: what is run, and on what; rows of a linear layer are the pixels of an image.
            packs: whether its input must be packed first.
            original: layout of its input, if that lies in a buffer; torch's way is timed on a view of it.
        """
        level = round(4 * math.log2(layer.density)) if layer.density else None
        key = (
            layer.inputs, layer.coefficients.channels, layer.groups, layer.window,
            addressing.source, addressing.target, packs, original, level, layer.coefficients.basis is None,
            layer.activation.kind, torch.get_num_threads(), isinstance(layer, Linear),
        )  # fmt: skip
        if key not in self._known:
            if isinstance(layer, Linear):
                self._known[key] = self._fastest_linear(layer, addressing)
            else:
                self._known[key] = self._fastest(layer, addressing, packs, original)
        return self._known[key]

    def _fastest_linear(self, layer: Linear, addressing: Addressing) -> Choice | None:
        """How to run a linear layer on so many rows; torch's way is timed on the dense weight, which is let go."""
        count = addressing.target.pixels
        rows = torch.randn(count, layer.inputs, generator=torch.Generator().manual_seed(0))
        choices = _linear_choices(count)
        runs: dict[Choice | None, Callable[[], object]] = {c: partial(layer.bind(c, count), rows) for c in choices}
        if layer.density >= _SPARSE:
            weight, bias = layer.weight(), torch.from_numpy(layer.bias)
            runs[None] = lambda: layer.activation(F.linear(rows, weight, bias))
        return self._clearly_fastest(by_rule(layer, addressing), runs)

    def _clearly_fastest(
        self, default: Choice | None, runs: dict[Choice | None, Callable[[], object]]
    ) -> Choice | None:
        """The fastest of several ways, if it is clearly faster than the default one."""
        return self._fastest_first(default, runs)[0]

    def _fastest_first(
        self, default: Choice | None, runs: dict[Choice | None, Callable[[], object]]
    ) -> list[Choice | None]:
        """The fastest of several ways, if it is clearly faster than the default one, and those that are close."""
        seconds = self._timer or partial(_seconds, other_memory=torch.ones(_OTHER_MEMORY))
        times = dict(zip(runs, seconds(list(runs.values())), strict=True))
        ways = sorted(times, key=times.__getitem__)
        best = ways[0] if times[ways[0]] < _CLEARLY * times[default] else default
        return [best, *(way for way in ways if way != best and times[way] <= _CLOSE * times[ways[0]])][: 1 + _OTHERS]

    def _fastest(
        self, convolution: Convolution, addressing: Addressing, packs: bool, original: Layout | None
    ) -> Choice | None:
        source = addressing.source.empty(convolution.inputs)
        target = addressing.target.empty(convolution.coefficients.channels)
        view = addressing.target.view(target, convolution.coefficients.channels)
        shape = addressing.target.images, convolution.inputs, *addressing.size
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if original is not None:
            images = original.view(original.empty(convolution.inputs), convolution.inputs).copy_(images)
        weight, bias = convolution.weight(), torch.from_numpy(convolution.bias)

        def dense() -> object:  # its result must be moved to where it is read
            return view.copy_(F.conv2d(images, weight, bias, *convolution.window[1:], convolution.groups))

        def loop(choice: Choice) -> Callable[[], object]:
            entries = convolution.entries(choice.order)
            return Loop(entries, convolution.bias, addressing, choice, convolution.activation).bind(source, target)

        pack = partial(Packing.to_read(addressing).pack, Images.of(images), source)
        pack()
        by_the_rule = by_rule(convolution, addressing, response_dtype=self._response_dtype)
        choices = list(self._by_nonzeros(convolution, addressing))
        if convolution.density >= _WINOGRAD_TIMED:
            choices += _winograd_choices(convolution, addressing)
        sparse = by_the_rule or choices[0]
        first, *others = self._fastest_first(sparse, {choice: loop(choice) for choice in (sparse, *choices)})
        sparse = first or sparse
        if sparse.order == "fused":
            budgets = (sparse._replace(budget=budget) for budget in _BUDGETS)
            sparse = self._clearly_fastest(sparse, {choice: loop(choice) for choice in (sparse, *budgets)}) or sparse
        chosen = sparse._replace(others=tuple(filter(None, others)))
        if convolution.density < _SPARSE:
            return chosen
        run = partial(_both, pack, loop(sparse)) if packs else loop(sparse)
        return chosen if self._clearly_fastest(by_the_rule and sparse, {sparse: run, None: dense}) else None

    def _by_nonzeros(self, convolution: Convolution, addressing: Addressing) -> Iterator[Choice]:
        """Orders by non-zeros, widths and parts."""
        pixels, threads = addressing.target.pixels, torch.get_num_threads()
        standard = convolution.coefficients.basis is None
        for width in (32, 64, WIDEST):
            if width > 32 and width >= 2 * pixels:
                continue
            tiles = -(-pixels // width)
            for parts in {1, threads} if tiles < 8 * threads else {1}:
                if width > 32 and can_sum_columns(convolution) and addressing.can_align(width):
                    yield Choice("columns", width, parts)
                elif standard or convolution.depthwise:
                    yield Choice("direct", width, parts)
                if convolution.depthwise:
                    continue
                if not standard or len(addressing.offsets) > 1 or convolution.groups == 1:
                    yield Choice("fused", width, parts, response_dtype=self._response_dtype)


def can_sum_columns(convolution: Convolution) -> bool:
    """Whether a convolution has enough non-zeros for a sum for each column of its kernels."""
    entries, columns = convolution.coefficients, convolution.window.kernel[1]
    enough = len(entries.values) >= _FEW * columns * entries.channels
    sparse = convolution.density < _DENSE and not convolution.depthwise
    return entries.basis is None and columns > 1 and enough and sparse


def _linear_choices(rows: int) -> list[Choice]:
    """Ways to run a linear layer by its non-zeros: few rows one by one, and rows like pixels."""
    one_by_one = [Choice("direct", 1)] if rows <= _FEW_ROWS else []
    return [*one_by_one, Choice("direct", 32 if rows <= 32 else 64, torch.get_num_threads())]


def _winograd_choices(convolution: Convolution, addressing: Addressing) -> Iterator[Choice]:
    """Winograd's filtering, where that is possible."""
    channel = 4 * winograd.POINTS * convolution.inputs
    if (
        convolution.window != Window((3, 3), padding=(1, 1))
        or convolution.groups > 1
        or channel * convolution.coefficients.channels > _FILTERS
    ):
        return
    threads, tiles = torch.get_num_threads(), _winograd_tiles(addressing)
    for width in (16, 32, 64, 128):
        if width > 16 and (width * channel > _PATCHES or width >= 2 * tiles):
            break
        for parts in {1, threads} if tiles < 8 * threads * width else {1}:
            yield Choice("winograd", width, parts)


def _winograd_tiles(addressing: Addressing) -> int:
    """How many of Winograd's tiles the output has."""
    images, height, width = addressing.target[:3]
    return images * -(-height // winograd.TILE) * -(-width // winograd.TILE)


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Run two functions."""
    first()
    second()


def _seconds(runs: Sequence[Callable[[], object]], other_memory: Tensor) -> list[float]:
    """Seconds of each of several ways, which take turns; other memory is read in between, as by the rest of a network.

    The fastest run counts: what else the machine does makes runs slower, never faster.
    """
    for run in runs:
        run()
    took: list[list[float]] = [[] for _ in runs]
    for _ in range(_RUNS):
        for times, run in zip(took, runs, strict=True):
            other_memory.sum()
            begin = perf_counter()
            run()
            times.append(perf_counter() - begin)
    return [min(times) for times in took]
