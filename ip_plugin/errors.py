"""What a user can get wrong: one ``ValueError`` for each kind of mistake; the words stand where it is raised.

Every message says three things: the rule (what was looked for), what was found, what to do.

>>> import torch, ip_plugin
>>> try:
...     ip_plugin.interspace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), layers=["1"])
... except ip_plugin.errors.SelectionError as error:
...     print(error)
Every name in `layers` must be the name of a module of the model.
Found: no module '1'
What to do: use names from `model.named_modules()`; the closest are '0'
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names quoted, comma-separated, and cut after `most` of them, for a message."""
    quoted = [repr(name) for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest} more" if rest > 0 else "")


class InterspaceError(ValueError):
    """Base of all errors of this package.

    Args:
        rule: what was looked for.
        found: what was found instead.
        remedy: what to do.
    """

    def __init__(self, rule: str, found: str, remedy: str) -> None:
        super().__init__(f"{rule}\nFound: {found}\nWhat to do: {remedy}")
        self.rule, self.found, self.remedy = rule, found, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.rule, self.found, self.remedy)


def _rebuild(cls: type[InterspaceError], rule: str, found: str, remedy: str) -> InterspaceError:
    error = cls.__new__(cls)
    InterspaceError.__init__(error, rule, found, remedy)
    return error


class SelectionError(InterspaceError):
    """Layers, tensors or modules that were named or selected, and that are not there, not suitable or given twice."""


class ConversionError(InterspaceError):
    """A model that cannot be converted as it is: parametrized, pruned, tied, wrapped, compiled, not finite."""


class BasisError(InterspaceError):
    """A basis that cannot represent every kernel, or layers that cannot share one."""


class MaskError(InterspaceError):
    """A mask that does not fit its tensor, or that is missing."""


class AmountError(InterspaceError):
    """An amount, a sparsity or a minimum that is no number, or outside of what there is to prune."""


class ScoreError(InterspaceError):
    """Importance scores of a wrong shape, or that are not finite."""


class ArgumentError(InterspaceError):
    """An option whose value is not understood."""


class OptimizerError(InterspaceError):
    """An optimizer that does not train the model."""


class BatchError(InterspaceError):
    """Inputs, targets, outputs or a loss that the model or a criterion cannot use."""


class CheckpointError(InterspaceError):
    """A checkpoint that cannot be written, is corrupt, or belongs to another model."""


class HostError(InterspaceError):
    """What a pruning library (the host) was given, or did, and what cannot be carried over to coefficients."""


class SparseExecutionError(InterspaceError):
    """Something that a sparse network cannot run."""


class StudyError(InterspaceError):
    """A study that cannot be run as asked, or a results folder that is not its own."""


class LayerCollapseWarning(UserWarning):
    """A layer keeps almost nothing, or nothing, of what passes through it, while others keep much more."""


class SparseFallbackWarning(UserWarning):
    """A network is run sparse more slowly than it could be: in parts, or by threads that are slow to start."""
