"""The methods of `ip_plugin.methods` as criteria of ``ip-plugin compare``.

Every layer keeps at least one entry, in both spaces: a network that is cut in two tells nothing about what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ip_plugin import prunable
from ip_plugin.adapters import Criterion, Training, TrainingCriterion
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.methods import (
    SET,
    Gradual,
    LotteryTicket,
    Movement,
    RigL,
    Score,
    apply_masks,
    grasp,
    lamp,
    magnitude,
    movement,
    prune,
    prune_fitted,
    random,
    select,
    snip,
    synflow,
)
from ip_plugin.utils.seeds import derived_seed

#: Batches that scores are computed on: of a hundred images, a thousand in all.
_BATCHES = 10
#: Updates of masks in a training.
_UPDATES = 40
#: Share of the steps after which lottery tickets are rewound to, and trainings before the last one.
_EARLY, _ROUNDS = 0.05, 3


def _size(model: nn.Module) -> int:
    return sum(getattr(*target).numel() for target in prunable(model))


def _at_once(score: Score, model: nn.Module, count: int) -> None:
    apply_masks(model, select(score(model), count=count, min_per_layer=1))


def _random(model: nn.Module, count: int) -> None:
    seed = derived_seed(torch.initial_seed(), "random scores")
    _at_once(partial(random, generator=torch.Generator().manual_seed(seed)), model, count)


def _fitted(model: nn.Module, count: int) -> None:
    """Where nothing is in the interspace there is no basis to fit: magnitude pruning."""
    if any(layer.interspace is not None for layer in prunable_tensors(model)):
        prune_fitted(model, sparsity=count / _size(model), min_per_layer=1)
    else:
        _at_once(magnitude, model, count)


def _with_data(score: Callable[..., Any], rounds: int, model: nn.Module, count: int, training: Training) -> None:
    """Score on batches at initialisation, prune, train."""
    bound = partial(score, batches=training.batches(_BATCHES), loss=training.loss)
    prune(model, bound, sparsity=count / _size(model), rounds=rounds, min_per_layer=1)
    training.train()


def _synflow(model: nn.Module, count: int, training: Training) -> None:
    images, _ = training.batches(1)[0]
    prune(model, partial(synflow, example_input=images[:1]), sparsity=count / _size(model), rounds=100, min_per_layer=1)
    training.train()


def _gradually(model: nn.Module, count: int, steps: int, first: float, **options: Any) -> Gradual:
    """From a share of the steps on until three quarters of them."""
    begin = round(first * steps)
    end = max(begin + 1, 3 * steps // 4)
    every = max(1, (end - begin) // _UPDATES)
    return Gradual(
        model,
        sparsity=count / _size(model),
        begin_step=begin,
        end_step=end,
        update_every=every,
        min_per_layer=1,
        **options,
    )


def _each_step(schedule: Gradual | SET) -> Callable[[object], object]:
    return lambda loss: schedule.step()  # noqa: ARG005  # only RigL needs the loss


def _gradual(model: nn.Module, count: int, training: Training) -> None:
    training.train(lambda optimizer: _each_step(_gradually(model, count, training.steps, 0.2)))  # noqa: ARG005


def _movement(model: nn.Module, count: int, training: Training) -> None:
    """Every layer loses the same part: one threshold for all leaves some layers next to nothing."""
    training.train()
    if training.finetuning_steps < 2:
        scores = movement(model, training.batches(_BATCHES), training.loss)
        apply_masks(model, select(scores, count=count, scope="layer", min_per_layer=1))
        training.finetune()
        return
    follower = Movement(model)

    def begin(optimizer: Optimizer) -> Callable[[object], object]:
        optimizer.register_step_pre_hook(lambda *_: follower.update())
        steps = training.finetuning_steps
        return _each_step(_gradually(model, count, steps, 0.1, score=lambda _: follower.scores(), scope="layer"))

    training.finetune(begin)


def _ticket(model: nn.Module, count: int, training: Training) -> None:
    ticket = LotteryTicket(model, min_per_layer=1)
    early = max(1, round(_EARLY * training.steps))
    steps = 0

    def remember(loss: object) -> None:  # noqa: ARG001
        nonlocal steps
        steps += 1
        if steps == early:
            ticket.remember()

    size, gone = _size(model), 0
    for number in range(1, _ROUNDS + 1):
        training.train(lambda optimizer: remember)  # noqa: ARG005  # in the first one, for steps go on
        goal = count if number == _ROUNDS else round(size * (1 - (1 - count / size) ** (number / _ROUNDS)))
        ticket.next_round((goal - gone) / (size - gone))
        gone = goal
    training.train()


def _moving(method: type[SET] | type[RigL], model: nn.Module, count: int, training: Training) -> None:
    def begin(optimizer: Optimizer) -> Callable[[Callable[[], Tensor]], object]:
        steps = training.steps
        schedule = method(
            model, optimizer, sparsity=count / _size(model), end_step=max(1, 3 * steps // 4),
            update_every=max(1, steps // _UPDATES), seed=training.seed,
        )  # fmt: skip
        return schedule.step if isinstance(schedule, RigL) else _each_step(schedule)

    training.train(begin)


CRITERIA: dict[str, Criterion | TrainingCriterion] = {
    "random": Criterion("random, at initialisation", "at initialisation", _random),
    "magnitude_init": Criterion("magnitude, at initialisation", "at initialisation", partial(_at_once, magnitude)),
    "snip": TrainingCriterion("SNIP, at initialisation", partial(_with_data, snip, 1)),
    "snip_rounds": TrainingCriterion("SNIP in 20 rounds, at initialisation", partial(_with_data, snip, 20)),
    "grasp": TrainingCriterion("GraSP, at initialisation", partial(_with_data, grasp, 1)),
    "synflow": TrainingCriterion("SynFlow in 100 rounds, at initialisation", _synflow),
    "ticket": TrainingCriterion(f"lottery ticket, magnitude in {_ROUNDS} rounds", _ticket, trainings=_ROUNDS + 1),
    "set": TrainingCriterion("SET, while training", partial(_moving, SET)),
    "rigl": TrainingCriterion("RigL, while training", partial(_moving, RigL)),
    "gradual": TrainingCriterion("gradual magnitude (GMP), while training", _gradual),
    "magnitude": Criterion("magnitude, after training", "after training", partial(_at_once, magnitude)),
    "fitted": Criterion("magnitude, after training; IP: in fitted bases", "after training", _fitted),
    "lamp": Criterion("LAMP, after training", "after training", partial(_at_once, lamp)),
    "movement": TrainingCriterion("movement, while fine-tuning", _movement, finetunings=1),
}
