"""Lottery tickets: train, prune, put everything back to an early step, and train again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.parametrization import Mask
from ..core.tensor_ref import parametrized_tensors
from ..errors import InvalidScheduleError
from ..utils.validation import is_fraction
from .schedules import Score, pruned_share
from .scores import magnitude
from .selection import Scope, apply_masks, select


class LotteryTicket:
    """Iterative magnitude pruning with rewinding (Frankle and Carbin 2019, arXiv 1803.03635; Frankle et al. 2020).

    ::

        ticket = LotteryTicket(model, optimizer)      # at the start, or after a few steps: what is rewound to
        for _ in range(rounds):
            train(model, optimizer)
            ticket.next_round(fraction=0.2)           # prunes a fifth of what is left, and rewinds
        train(model, optimizer)

    Coefficients, bases, biases, norms with their statistics, and the optimizer's state are put back; masks stay.

    Args:
        model: remembered as it is now.
        optimizer: one that trains the model, remembered too; None if there is none.
        score: what to keep.
        scope, min_per_layer: see `select`.

    >>> model = nn.Linear(10, 10, bias=False)
    >>> early = model.weight.detach().clone()
    >>> ticket = LotteryTicket(model)
    >>> _ = model.weight.data.add_(1.0)
    >>> ticket.next_round(fraction=0.2)
    >>> kept = model.parametrizations.weight[0].mask
    >>> int(kept.sum()), torch.equal(model.weight[kept], early[kept])
    (80, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        score: Score = magnitude,
        scope: Scope = "global",
        min_per_layer: int = 0,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.score, self.scope, self.min_per_layer = score, scope, min_per_layer
        self.remember()

    def remember(self) -> None:
        """Rewind to the present state from now on."""
        self._values = {name: tensor.detach().clone() for name, tensor in _tensors(self.model).items()}
        self._optimizer = None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict())

    def next_round(self, fraction: float = 0.2) -> None:
        """Prune a fraction of what is left by the present scores, then rewind.

        Raises:
            InvalidScheduleError: the fraction is not in [0, 1].
        """
        if not is_fraction(fraction):
            raise InvalidScheduleError("fraction", "a number in [0, 1]", fraction)
        scores = self.score(self.model)
        size = sum(score.numel() for score in scores.values())
        gone = round(pruned_share(scores) * size)
        count = gone + round(fraction * (size - gone))
        apply_masks(self.model, select(scores, count=count, scope=self.scope, min_per_layer=self.min_per_layer))
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        """Put everything but the masks back to what was remembered; Parameters stay the same objects."""
        for name, tensor in _tensors(self.model).items():
            tensor.copy_(self._values[name])
        if self.optimizer is not None and self._optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(self._optimizer))

    def state_dict(self) -> dict[str, Any]:
        """What is remembered; masks and present values are in the model's own state."""
        return {"values": dict(self._values), "optimizer": copy.deepcopy(self._optimizer)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Rewind to a remembered state of another run.

        Raises:
            InvalidScheduleError: it is one of another model; nothing has changed.
        """
        values: Mapping[str, Tensor] = state_dict["values"]
        expected = {name: tensor.shape for name, tensor in self._values.items()}
        found = {name: tensor.shape for name, tensor in values.items()}
        if expected != found:
            differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise InvalidScheduleError("state_dict", "the remembered tensors of this model", f"other {differ[:4]}")
        self._values = {name: values[name].detach().clone() for name in expected}
        self._optimizer = copy.deepcopy(state_dict["optimizer"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers without masks, by names that do not change when a layer is masked."""
    of_ours = {id(each.chain): each for each in parametrized_tensors(model)}
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        each = of_ours.get(id(module))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or (isinstance(module, Mask) and name != "basis"):
                continue
            plain = each.name if each and name == "original" else f"{prefix}.{name}"
            found[plain.removeprefix(".")] = tensor
    return found
