"""Around calls of a pruning library: check the optimizer, and undo what a failing call did to it and to the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ip_plugin.errors import OptimizerError


@contextmanager
def transaction(objects: Iterable[object], optimizer: Optimizer | None = None) -> Iterator[None]:
    """Undo what a failing block did to the attributes of some objects, and to an optimizer's groups and state.

    Attributes are remembered by reference, and so is the content of those that are dicts or lists: what the block
    replaces or registers is undone, but not what it writes into a tensor. Objects without a ``__dict__`` are skipped.
    """
    unique: list[Any] = list({id(value): value for value in objects if hasattr(value, "__dict__")}.values())
    saved = [(value, type(value), dict(vars(value))) for value in unique]
    containers = [value for *_, attributes in saved for value in attributes.values() if isinstance(value, (dict, list))]
    if optimizer is not None:
        lists = [value for group in optimizer.param_groups for value in group.values() if isinstance(value, list)]
        containers += [optimizer.state, *optimizer.param_groups, *lists]
    contents: list[tuple[Any, Any]] = [(value, value.copy() if value else ()) for value in containers]  # most are empty
    try:
        yield
    except BaseException:
        for value, cls, attributes in saved:
            if type(value) is not cls:
                value.__class__ = cls
            vars(value).clear()
            vars(value).update(attributes)
        for container, content in contents:
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)
        raise


def check_trained(optimizer: Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """Raise OptimizerError if an optimizer trains none of some Parameters."""
    if optimizer is None:
        return
    known = {id(parameter) for parameter in parameters}
    if not any(id(parameter) in known for group in optimizer.param_groups for parameter in group["params"]):
        raise OptimizerError(
            "The optimizer must train parameters of the model.",
            f"a {type(optimizer).__name__} with other parameters: none of the model's parameters is in its groups",
            "pass the optimizer that was built from this model's parameters",
        )
