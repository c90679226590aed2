"""All or nothing: a host's call that fails half way leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


@contextmanager
def transaction(objects: Iterable[object], optimizer: Optimizer | None = None) -> Iterator[None]:
    """Undo what a failing block did to the attributes of some objects, and to an optimizer's groups and state.

    Attributes are remembered by reference, and the content of dicts and lists that are attributes; so what a
    block replaces or registers is undone, what it writes into a tensor is not.

    Args:
        objects: modules and other objects with a ``__dict__``; others are passed over.
        optimizer: None if there is none.
    """
    saved = [_Saved(each) for each in {id(each): each for each in objects if hasattr(each, "__dict__")}.values()]
    groups = [] if optimizer is None else [(group, dict(group)) for group in optimizer.param_groups]
    lists = [(each, list(each)) for _, group in groups for each in group.values() if isinstance(each, list)]
    state = None if optimizer is None else dict(optimizer.state)
    try:
        yield
    except BaseException:
        for each in saved:
            each.restore()
        for group, content in groups:
            group.clear()
            group.update(content)
        for values, before in lists:
            values[:] = before
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(state or {})
        raise


class _Saved:
    """The attributes of one object, and what its containers held."""

    def __init__(self, target: object) -> None:
        self.target, self.cls = target, type(target)
        self.attributes = dict(vars(target))
        containers = [each for each in self.attributes.values() if isinstance(each, (dict, list))]
        self.empty = [each for each in containers if not each]  # most of them
        self.contents = [(each, each.copy()) for each in containers if each]

    def restore(self) -> None:
        target: Any = self.target
        if type(target) is not self.cls:
            target.__class__ = self.cls
        vars(target).clear()
        vars(target).update(self.attributes)
        for container in self.empty:
            container.clear()
        for container, content in self.contents:
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)
