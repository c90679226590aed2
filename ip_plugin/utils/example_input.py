"""Running a model once on an example input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BatchError
from .preserved_state import preserved_state


def arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an example input stands for: a tuple, a mapping, or one argument.

    >>> arguments({"input": 1}), arguments((1, 2)), arguments([1, 2])
    (((), {'input': 1}), ((1, 2), {}), (([1, 2],), {}))
    """
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}


@torch.no_grad()
def run(model: nn.Module, example_input: Any) -> Any:
    """The outputs of a model in evaluation mode, computed without gradients.

    Args:
        model: not changed.
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Raises:
        BatchError: the model does not run on it.

    >>> run(nn.Linear(2, 3), torch.zeros(1, 2)).shape
    torch.Size([1, 3])
    """
    with preserved_state(model):
        model.eval()
        try:
            args, kwargs = arguments(example_input)
            return model(*args, **kwargs)
        except Exception as error:
            shape = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
            raise BatchError(
                "The model must run on `example_input`: a tensor, a tuple of arguments or a dict of keyword arguments.",
                f"{type(error).__name__} on {shape}: {error}",
                "pass an input as the model's forward takes it, on the model's device",
            ) from error
