"""Which way to run a convolution: chosen by timing once, or by a rule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .convolution import Images, Places, SparseConvolution, pack
from .graph import Convolution
from .layout import WIDEST
from .plan import Choice

#: How often each candidate is run; the fastest run counts.
_RUNS = 5
#: Bytes of responses at a time: about a first-level cache, or parts of a second-level one.
_BUDGETS = (40_000, 80_000, 160_000, 320_000)
#: From this share of non-zeros on the rule runs a convolution dense.
_DENSE = 0.5


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


def _rule(convolution: Convolution, where: Places, narrow: bool) -> Choice | None:
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

    def dense() -> object:
        return view.copy_(F.conv2d(images, weight, bias, *window[1:], convolution.groups))

    def sparse(choice: Choice) -> float:
        run = SparseConvolution(convolution.entries, convolution.bias, where, choice)
        return _time(partial(run, source, target, run.scratch()))

    times = {choice: sparse(choice) for choice in _shapes(convolution, where, narrow)}
    found = min(times, key=times.__getitem__)
    times.update((choice, sparse(choice)) for choice in _budgets(found))
    found = min(times, key=times.__getitem__)
    return found if times[found] + (_time(packing) if packs else 0.0) < _time(dense) else None


def _time(run: Callable[[], object]) -> float:
    run()
    took = []
    for _ in range(_RUNS):
        begin = time.perf_counter()
        run()
        took.append(time.perf_counter() - begin)
    return min(took)
