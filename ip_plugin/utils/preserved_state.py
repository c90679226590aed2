"""Running a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved_state(model: nn.Module, *, buffers: bool = False, attributes: bool = False) -> Iterator[None]:
    """Undo what the block does to a model, also if it fails.

    Training modes, gradients, and the random state of the CPU and of the model's CUDA devices are always restored.

    Args:
        model: run in the block.
        buffers: restore the values of buffers as well, those of bools (masks) excepted.
        attributes: restore the attributes of every module as well, its Parameters and buffers among them: by reference,
            so that what the block replaces is undone, and what it writes into a tensor is not.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with preserved_state(model):
    ...     model.eval()(torch.ones(1, 2)).sum().backward()
    >>> model[1].training, model[0].weight.grad
    (True, None)
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    values = [(b, b.clone()) for b in model.buffers() if b.dtype is not torch.bool] if buffers else []
    owners = model.modules() if attributes else ()
    content = [(place, dict(place)) for m in owners for place in (vars(m), m._parameters, m._buffers)]
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for place, before in content:
                if place.keys() != before.keys() or any(place[key] is not value for key, value in before.items()):
                    place.clear()
                    place.update(before)
            for module, mode in modes:
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
