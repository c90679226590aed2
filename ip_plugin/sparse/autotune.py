"""Which way to run a convolution: chosen by timing once, or by a rule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolution import looped
from .graph import Convolution
from .images import Images, pack
from .kernels import winograd
from .layout import WIDEST
from .places import Places, Window
from .plan import Choice

#: How often each candidate is run; the fastest run counts.
_RUNS = 5
#: Bytes of responses at a time: about a first-level cache, or parts of a second-level one.
_BUDGETS = (40_000, 80_000, 160_000, 320_000)
#: From this share of non-zeros on the rule runs a convolution dense.
_DENSE = 0.5
#: From this share on the rule runs a 3x3 convolution by Winograd's tiles, if there are enough of them.
_AT_POINTS, _TILES = 0.2, 8
#: From this share on these tiles are timed.
_AT_POINTS_TIMED = 0.08
#: Bytes of filters at Winograd's points at most (they take four times what dense kernels take), and of patches: about a
#: second-level cache.
_FILTERS, _PATCHES = 5_000_000, 1_500_000
#: How many numbers are read between two runs, by all threads: other layers' coefficients take second-level caches.
_ELSEWHERE = 2_000_000


class Chooser:
    """Chooses, and remembers for layers of one kind.

    Args:
        by_rule: do not time anything; the same choice on every machine and in every process.
        narrow: keep responses to a basis as bfloat16.
    """

    def __init__(self, by_rule: bool, narrow: bool = False) -> None:
        self.by_rule, self.narrow = by_rule, narrow
        self._known: dict[tuple[Any, ...], Choice | None] = {}

    def __call__(self, convolution: Convolution, where: Places, size: tuple[int, int], packs: bool) -> Choice | None:
        """How to run a convolution; None: by torch.

        Args:
            convolution: what is run.
            where: layouts, and taps.
            size: height and width of the input.
            packs: whether the input must be packed first.
        """
        if self.by_rule:
            return _rule(convolution, where, self.narrow)
        filled = convolution.density
        level = round(4 * math.log2(filled)) if filled else None
        key = (
            convolution.inputs, convolution.entries.channels, convolution.groups, convolution.window, where.source,
            where.target, packs, level, convolution.entries.basis is None, torch.get_num_threads(),
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = _fastest(convolution, where, size, packs, self.narrow)
        return self._known[key]


def _shapes(convolution: Convolution, where: Places, narrow: bool) -> Iterator[Choice]:
    """What differs in order, width and parts."""
    pixels, threads = where.target.pixels, torch.get_num_threads()
    for width in (32, 64, WIDEST):
        if width > 32 and width >= 2 * pixels:
            continue
        tiles = -(-pixels // width)
        for parts in {1, threads} if tiles < 8 * threads else {1}:
            if convolution.entries.basis is None:
                yield Choice("direct", width, parts)
            if convolution.entries.basis is not None or len(where.offsets) > 1 or convolution.groups == 1:
                yield Choice("fused", width, parts, narrow=narrow and convolution.entries.basis is not None)


def _budgets(choice: Choice) -> Iterator[Choice]:
    """The same with other budgets."""
    if choice.order == "fused":
        yield from (choice._replace(budget=budget) for budget in _BUDGETS if budget != choice.budget)


def _at_points(convolution: Convolution, where: Places) -> Iterator[Choice]:
    """By Winograd's tiles, where that can be."""
    channel = 4 * winograd.POINTS * convolution.inputs
    if (
        convolution.window != Window((3, 3), padding=(1, 1))
        or convolution.groups > 1
        or channel * convolution.entries.channels > _FILTERS
    ):
        return
    threads, tiles = torch.get_num_threads(), _tiles(where)
    for width in (16, 32, 64, 128):
        if width > 16 and (width * channel > _PATCHES or width >= 2 * tiles):
            break
        for parts in {1, threads} if tiles < 8 * threads * width else {1}:
            yield Choice("winograd", width, parts)


def _tiles(where: Places) -> int:
    """How many tiles of Winograd's the output has."""
    images, height, width = where.target[:3]
    return images * -(-height // winograd.TILE) * -(-width // winograd.TILE)


def _rule(convolution: Convolution, where: Places, narrow: bool) -> Choice | None:
    at_points = next(_at_points(convolution, where), None)
    if at_points and convolution.density >= _AT_POINTS and _tiles(where) >= _TILES:
        return at_points._replace(parts=1)
    if convolution.density >= _DENSE:
        return None
    width = 64 if where.target.pixels > 32 else 32
    if convolution.entries.basis is None and (convolution.density < 0.03 or convolution.groups > 1):
        return Choice("direct", width)
    return Choice("fused", width, narrow=narrow and convolution.entries.basis is not None)


def _fastest(
    convolution: Convolution, where: Places, size: tuple[int, int], packs: bool, narrow: bool
) -> Choice | None:
    outputs, inputs, weight = convolution.entries.channels, convolution.inputs, convolution.weight()
    source, target = where.source.empty(inputs * len(where.phases)), where.target.empty(outputs)
    images = torch.randn(where.source.images, inputs, *size, generator=torch.Generator().manual_seed(0))
    window, bias = convolution.window, torch.from_numpy(convolution.bias)
    view = where.target.view(target, outputs)
    packing = partial(pack, Images.of(images), where, window, source)
    elsewhere = torch.ones(_ELSEWHERE)

    def dense() -> object:
        return view.copy_(F.conv2d(images, weight, bias, *window[1:], convolution.groups))

    def time_of(choice: Choice) -> float:
        run = looped(convolution.entries, convolution.bias, where, choice)
        return _time(partial(run, source, target, run.scratch()), elsewhere)

    times = {choice: time_of(choice) for choice in _shapes(convolution, where, narrow)}
    found = min(times, key=times.__getitem__)
    times.update((choice, time_of(choice)) for choice in _budgets(found))
    if convolution.density >= _AT_POINTS_TIMED:
        times.update((choice, time_of(choice)) for choice in _at_points(convolution, where))
    found = min(times, key=times.__getitem__)
    sparse = times[found] + (_time(packing, elsewhere) if packs else 0.0)
    return found if sparse < _time(dense, elsewhere) else None


def _time(run: Callable[[], object], elsewhere: Tensor) -> float:
    """Seconds of the fastest run; coefficients come from where the rest of a network leaves them."""
    run()
    took = []
    for _ in range(_RUNS):
        elsewhere.sum()
        begin = time.perf_counter()
        run()
        took.append(time.perf_counter() - begin)
    return min(took)
