"""Schedules that only prune: once, in rounds, or more and more while the network trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..core.tensor_ref import Model
from ..errors import InvalidScheduleError
from ..utils.validation import check_fraction, is_count
from .scores import Scores, magnitude
from .selection import Scope, apply_masks, select

#: Called with the model; a score of `ip_plugin.methods`, with its other arguments bound by `functools.partial`.
Score = Callable[[nn.Module], Scores]


def prune(
    model: Model,
    score: Score = magnitude,
    *,
    sparsity: float,
    rounds: int = 1,
    scope: Scope = "global",
    min_per_layer: int = 0,
    after_round: Callable[[], object] = lambda: None,
) -> Model:
    """Prune at once, or in rounds that score anew what is left: round k of n goes to density ``d**(k / n)``.

    Args:
        model: changed in place: its masks.
        score: what to keep.
        sparsity: of the prunable tensors at the end; rounds that would leave more than there is are passed over.
        rounds: 100 for SynFlow (Tanaka et al. 2020, arXiv 2006.05467), a few for iterative SNIP.
        scope, min_per_layer: see `select`.
        after_round: called after each round that has pruned, the last one included; `reconstruct` for example.

    Returns:
        The model.

    Raises:
        InvalidScheduleError: fewer than one round.
        InvalidAmountError, AlreadySparserError: see `select`; the model keeps the rounds that were done.

    >>> from functools import partial
    >>> import torch
    >>> from ip_plugin import interspace, report
    >>> from ip_plugin.methods import synflow
    >>> model = interspace(nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)))
    >>> model = prune(model, partial(synflow, example_input=torch.ones(1, 1, 5, 5)), sparsity=0.9, rounds=100)
    >>> report(model).prunable.nonzeros
    65
    """
    whole(rounds, "rounds", 1)
    check_fraction(sparsity)
    for done in range(1, rounds + 1):
        scores = score(model)
        partly = 1 - (1 - sparsity) ** (done / rounds) if done < rounds else sparsity
        if done == rounds or partly > pruned_share(scores):
            apply_masks(model, select(scores, sparsity=partly, scope=scope, min_per_layer=min_per_layer))
            del scores
            after_round()
    return model


class Gradual:
    """Gradual magnitude pruning: sparsity rises by a cubic law while the network trains.

    After Zhu and Gupta 2017 (arXiv 1710.01878). Call `step` after each ``optimizer.step()``. What is pruned stays so.

    Args:
        model: changed in place: its masks.
        sparsity: at the end.
        end_step: the step at which it is reached.
        begin_step: the step at which the first pruning happens.
        update_every: how many steps lie between two prunings.
        initial: sparsity at `begin_step`.
        score: what to keep, asked anew each time.
        scope, min_per_layer: see `select`.

    Raises:
        InvalidAmountError, InvalidScheduleError

    >>> model = nn.Linear(10, 10)
    >>> schedule = Gradual(model, sparsity=0.8, end_step=3)
    >>> for _ in range(4):
    ...     # loss.backward(); optimizer.step()
    ...     print(schedule.step(), round(schedule.sparsity_now, 3))
    True 0.563
    True 0.77
    True 0.8
    False 0.8
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        end_step: int,
        begin_step: int = 0,
        update_every: int = 1,
        initial: float = 0.0,
        score: Score = magnitude,
        scope: Scope = "global",
        min_per_layer: int = 0,
    ) -> None:
        check_fraction(sparsity)
        check_fraction(initial, "initial")
        whole(begin_step, "begin_step", 0)
        whole(update_every, "update_every", 1)
        whole(end_step, "end_step", begin_step + 1)
        if initial > sparsity:
            raise InvalidScheduleError("initial", f"at most the final sparsity {sparsity}", initial)
        self.model, self.score, self.scope, self.min_per_layer = model, score, scope, min_per_layer
        self.sparsity, self.initial = sparsity, initial
        self.begin_step, self.end_step, self.update_every = begin_step, end_step, update_every
        self.steps = 0

    @property
    def sparsity_now(self) -> float:
        """What the law says for the steps that were made."""
        left = 1 - min(1.0, max(0.0, (self.steps - self.begin_step) / (self.end_step - self.begin_step)))
        return self.sparsity + (self.initial - self.sparsity) * left**3

    def step(self) -> bool:
        """Count a step of training, and prune if it is time; returns whether masks have changed."""
        self.steps += 1
        if not due(self.steps, self.begin_step, self.end_step, self.update_every):
            return False
        scores = self.score(self.model)
        if self.sparsity_now <= pruned_share(scores):
            return False
        apply_masks(
            self.model, select(scores, sparsity=self.sparsity_now, scope=self.scope, min_per_layer=self.min_per_layer)
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed needs besides the model's own state, masks included."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.steps = int(state_dict["steps"])


def due(step: int, begin_step: int, end_step: int, update_every: int) -> bool:
    """Whether a schedule acts at a step: every so many from `begin_step` on, and at `end_step`."""
    return begin_step <= step <= end_step and ((step - begin_step) % update_every == 0 or step == end_step)


def pruned_share(scores: Scores) -> float:
    """The share of entries that are pruned already: their scores are -inf."""
    gone = sum(int((score == -math.inf).sum()) for score in scores.values())
    return gone / max(1, sum(score.numel() for score in scores.values()))


def whole(value: object, name: str, least: int) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if not is_count(value, least):
        raise InvalidScheduleError(name, f"a whole number of at least {least}", value)
