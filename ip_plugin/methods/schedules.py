"""Pruning schedules: at once, in rounds, or gradually while the network trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..core.tensor_ref import Model, Target, TensorRef, prunable_tensors, unknown_layer
from ..errors import AmountError, ArgumentError, SelectionError
from ..utils.validation import check_fraction, is_count
from .scores import Scores, magnitude
from .selection import Masks, Scope, apply_masks, least, select

#: A function of the model: a score of `ip_plugin.methods`, with its other arguments bound by `functools.partial`.
Score = Callable[[nn.Module], Scores]


def prune(
    model: Model,
    score: Score = magnitude,
    *,
    sparsity: float | Mapping[str | Target, float],
    rounds: int = 1,
    scope: Scope = "global",
    min_per_layer: int = 0,
    after_round: Callable[[], object] = lambda: None,
) -> Model:
    """Prune at once, or in rounds that compute the scores again: round k of n prunes to the density ``d**(k / n)``.

    Args:
        model: its masks are changed in place.
        score: entries with the highest scores are kept.
        sparsity: of the prunable tensors at the end. Rounds whose sparsity the model has already are skipped. Or that
            of each layer: {module name, or target of `ip_plugin.prunable(model)`: fraction}, as `Sensitivity.suggest`
            returns it; layers without a key are left alone.
        rounds: 100 for SynFlow (Tanaka et al. 2020, arXiv 2006.05467), a few for iterative SNIP.
        scope, min_per_layer: see `select`. Where layers have a sparsity of their own, there is no scope.
        after_round: called after each round that has pruned, the last one included; `reconstruct` for example.

    Returns:
        The model.

    Raises:
        ArgumentError: fewer than one round; a scope besides sparsities of layers.
        AmountError: see `select`; the model keeps the rounds that were done.
        SelectionError: a key of `sparsity` that is no prunable layer, or two for one layer. Sparsities of layers are
            checked before anything changes.

    >>> from functools import partial
    >>> import torch
    >>> from ip_plugin import interspace, report
    >>> from ip_plugin.methods import synflow
    >>> model = interspace(nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)))
    >>> model = prune(model, partial(synflow, example_input=torch.ones(1, 1, 5, 5)), sparsity=0.9, rounds=100)
    >>> report(model).prunable.nonzeros
    65
    >>> model = prune(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), sparsity={"0": 0.75, "2": 0.5})
    >>> [row.nonzeros for row in report(model).rows]
    [8, 4]
    """
    check_whole(rounds, "rounds", 1)
    by_layer = _by_layer(model, sparsity, scope, min_per_layer) if isinstance(sparsity, Mapping) else None
    total = 0.0 if isinstance(sparsity, Mapping) else check_fraction(sparsity)

    def masks(scores: Scores, done: int) -> Masks:
        """The masks after round `done`, of what is to be pruned further in it."""
        parts = [(scores, total)]
        if by_layer is not None:
            layers = [layer for layer in prunable_tensors(model) if layer.module_name in by_layer]
            parts = [({layer.target: scores[layer.target]}, by_layer[layer.module_name]) for layer in layers]
        chosen: Masks = {}
        for part, final in parts:
            now = 1 - (1 - final) ** (done / rounds) if done < rounds else final
            if done == rounds or now > pruned_share(part):
                chosen |= select(part, sparsity=now, scope=scope, min_per_layer=min_per_layer)
        return chosen

    for done in range(1, rounds + 1):
        if chosen := masks(score(model), done):
            apply_masks(model, chosen)
            after_round()
    return model


def _by_layer(
    model: nn.Module, sparsities: Mapping[str | Target, float], scope: Scope, min_per_layer: int
) -> dict[str, float]:
    """Sparsities of layers by module name; raises as `prune`."""
    if scope != "global":
        raise ArgumentError(
            "`scope` must be left out where every layer has a sparsity of its own.", f"{scope!r}", "leave it out"
        )
    layers = {layer.module_name: layer for layer in prunable_tensors(model)}
    names = {layer.target: name for name, layer in layers.items()}
    by_layer: dict[str, float] = {}
    for key, value in sparsities.items():
        name = key if isinstance(key, str) else f"{key!r} ({type(key).__name__})"
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], nn.Module):
            name = names.get(TensorRef(*key).target, f"{key[1]} of a {type(key[0]).__name__}")
        if name not in layers:
            raise unknown_layer(name, layers, "sparsity", "prunable layer")
        if name in by_layer:
            rule = "`sparsity` must have one key for each layer."
            raise SelectionError(rule, f"a name and a target of layer {name!r}", "keep one of them")
        by_layer[name] = check_fraction(value, f"sparsity[{name!r}]")
        entries, mask = layers[name].parameter.numel(), layers[name].mask
        left, keep = entries if mask is None else int(mask.sum()), entries - round(value * entries)
        if keep > left:
            raise AmountError(
                f"The sparsity of layer {name!r} must not be below the one that it has: pruned entries stay pruned.",
                f"{value!r}, which keeps {keep} entries of {entries}; {left} are not pruned",
                "ask for a higher sparsity, or leave the layer out",
            )
        least(min_per_layer, [left], keep)
    if not by_layer:
        rule = "`sparsity` must be a fraction, or name at least one layer."
        raise SelectionError(rule, "an empty mapping", "pass {layer: fraction}")
    return by_layer


class Gradual:
    """Gradual magnitude pruning: the sparsity follows a cubic schedule while the network trains.

    After Zhu and Gupta 2017 (arXiv 1710.01878). Call `step` after each ``optimizer.step()``. Pruned entries stay so.

    Args:
        model: its masks are changed in place.
        sparsity: final sparsity.
        end_step: the step at which it is reached.
        begin_step: the step of the first pruning.
        update_every: number of steps between two prunings.
        initial: sparsity at `begin_step`.
        score: entries with the highest scores are kept; computed again at each pruning.
        scope, min_per_layer: see `select`.

    Raises:
        AmountError: of the sparsities.
        ArgumentError: of the steps.

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
        check_whole(begin_step, "begin_step", 0)
        check_whole(update_every, "update_every", 1)
        check_whole(end_step, "end_step", begin_step + 1)
        if initial > sparsity:
            raise AmountError(
                f"`initial` must be at most the final sparsity {sparsity}.", f"{initial!r}", "lower `initial`"
            )
        self.model, self.score, self.scope, self.min_per_layer = model, score, scope, min_per_layer
        self.sparsity, self.initial = sparsity, initial
        self.begin_step, self.end_step, self.update_every = begin_step, end_step, update_every
        self.steps = 0

    @property
    def sparsity_now(self) -> float:
        """The sparsity of the schedule after the steps so far."""
        remaining = 1 - min(1.0, max(0.0, (self.steps - self.begin_step) / (self.end_step - self.begin_step)))
        return self.sparsity + (self.initial - self.sparsity) * remaining**3

    def step(self) -> bool:
        """Count a training step, and prune if it is due; returns whether masks have changed."""
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
        """What is needed to resume, besides the model's state (which includes masks)."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a saved state."""
        self.steps = int(state_dict["steps"])


def due(step: int, begin_step: int, end_step: int, update_every: int) -> bool:
    """Whether a schedule acts at a step: from `begin_step` on every `update_every` steps, and at `end_step`."""
    return begin_step <= step <= end_step and ((step - begin_step) % update_every == 0 or step == end_step)


def pruned_share(scores: Scores) -> float:
    """The share of entries that are pruned already: their scores are -inf."""
    pruned = sum(int((score == -math.inf).sum()) for score in scores.values())
    return pruned / max(1, sum(score.numel() for score in scores.values()))


def check_whole(value: object, name: str, least: int) -> None:
    """Raise ArgumentError if the argument `name` is not a whole number of at least `least`."""
    if not is_count(value, least):
        raise ArgumentError(f"`{name}` must be a whole number of at least {least}.", f"{value!r}", f"change `{name}`")
