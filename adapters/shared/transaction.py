"""Undo what a failing call of a pruning library did to a model and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from ip_plugin.core.parametrization import Mask


@contextmanager
def transaction(objects: Iterable[object], optimizer: Optimizer | None = None) -> Iterator[None]:
    """Undo what a failing block did to the attributes of some objects, and to an optimizer's groups and state.

    Attributes are remembered by reference, and so is the content of those that are dicts or lists: what the block
    replaces or registers is undone, and what it writes into masks of ours, but not into other tensors.

    Args:
        objects: modules and other objects with a ``__dict__``; others are passed over.
        optimizer: None if there is none.
    """
    saved = [_Saved(value) for value in {id(value): value for value in objects if hasattr(value, "__dict__")}.values()]
    groups = [] if optimizer is None else optimizer.param_groups
    lists = [value for group in groups for value in group.values() if isinstance(value, list)]
    containers: list[Any] = [] if optimizer is None else [optimizer.state, *groups, *lists]
    contents = [(container, container.copy()) for container in containers]
    try:
        yield
    except BaseException:
        for attributes in saved:
            attributes.restore()
        _refill(contents)
        raise


class _Saved:
    """The attributes of one object, and the content of its containers."""

    def __init__(self, target: object) -> None:
        self.target, self.cls = target, type(target)
        self.attributes = dict(vars(target))
        containers = [value for value in self.attributes.values() if isinstance(value, (dict, list))]
        self.empty = [value for value in containers if not value]  # most of them
        self.contents = [(value, value.copy()) for value in containers if value]
        self.mask = target.mask.clone() if isinstance(target, Mask) and target.mask is not None else None

    def restore(self) -> None:
        target: Any = self.target
        if type(target) is not self.cls:
            target.__class__ = self.cls
        vars(target).clear()
        vars(target).update(self.attributes)
        for container in self.empty:
            container.clear()
        _refill(self.contents)
        if self.mask is not None:
            target.set_mask(self.mask, self.mask)


def _refill(contents: list[tuple[Any, Any]]) -> None:
    for container, content in contents:
        container.clear()
        container.update(content) if isinstance(container, dict) else container.extend(content)
