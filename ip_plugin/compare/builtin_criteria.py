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

from ip_plugin import methods, prunable
from ip_plugin.adapters import Criterion, TrainingContext
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.utils.seeds import derived_seed

#: Batches that scores are computed on: of a hundred images, a thousand in all.
_BATCHES = 10
#: Updates of masks in a training.
_UPDATES = 40
#: Lottery tickets: the share of the steps after which weights are remembered, and how often the network is pruned.
_EARLY, _ROUNDS = 0.05, 3


def _size(model: nn.Module) -> int:
    return sum(getattr(*target).numel() for target in prunable(model))


def _one_shot(score: methods.Score, model: nn.Module, count: int, scope: methods.Scope = "global") -> None:
    methods.apply_masks(model, methods.select(score(model), count=count, scope=scope, min_per_layer=1))


_magnitude = partial(_one_shot, methods.magnitude)


def _random(model: nn.Module, count: int, scope: methods.Scope = "global") -> None:
    seed = derived_seed(torch.initial_seed(), "random scores")
    _one_shot(partial(methods.random, generator=torch.Generator().manual_seed(seed)), model, count, scope)


def _fitted(model: nn.Module, count: int) -> None:
    """In a plain network there is no basis to fit: magnitude pruning."""
    if any(layer.interspace is not None for layer in prunable_tensors(model)):
        methods.prune_fitted(model, sparsity=count / _size(model), min_per_layer=1)
    else:
        _magnitude(model, count)


def _with_data(score: Callable[..., Any], rounds: int, model: nn.Module, count: int, training: TrainingContext) -> None:
    with_batches = partial(score, batches=training.batches(_BATCHES), loss=training.loss)
    methods.prune(model, with_batches, sparsity=count / _size(model), rounds=rounds, min_per_layer=1)


def _synflow(model: nn.Module, count: int, training: TrainingContext) -> None:
    score = partial(methods.synflow, example_input=training.batches(1)[0][0][:1])
    methods.prune(model, score, sparsity=count / _size(model), rounds=100, min_per_layer=1)


def _gradual_schedule(model: nn.Module, count: int, steps: int, first: float, **options: Any) -> methods.Gradual:
    """A schedule that begins after the share `first` of the steps and ends after three quarters of them."""
    begin = round(first * steps)
    end = max(begin + 1, 3 * steps // 4)
    every = max(1, (end - begin) // _UPDATES)
    return methods.Gradual(
        model, sparsity=count / _size(model), begin_step=begin, end_step=end, update_every=every, min_per_layer=1,
        **options,
    )  # fmt: skip


def _step(schedule: methods.Gradual | methods.SET) -> Callable[[object], object]:
    """What a training calls after each step: only RigL needs the loss."""
    return lambda loss: schedule.step()  # noqa: ARG005


def _gradual(model: nn.Module, count: int, training: TrainingContext) -> None:
    training.train(lambda optimizer: _step(_gradual_schedule(model, count, training.steps, 0.2)))  # noqa: ARG005


def _movement(model: nn.Module, count: int, training: TrainingContext) -> None:
    """The same share of every layer is pruned: one threshold for all layers leaves next to nothing of some of them."""
    training.train()
    if training.finetuning_steps < 2:
        scores = methods.movement(model, training.batches(_BATCHES), training.loss)
        methods.apply_masks(model, methods.select(scores, count=count, scope="layer", min_per_layer=1))
        training.finetune()
        return
    accumulated = methods.Movement(model)

    def begin(optimizer: Optimizer) -> Callable[[object], object]:
        optimizer.register_step_pre_hook(lambda *_: accumulated.update())
        scores = {"score": lambda _: accumulated.scores(), "scope": "layer"}
        return _step(_gradual_schedule(model, count, training.finetuning_steps, 0.1, **scores))

    training.finetune(begin)


def _ticket(model: nn.Module, count: int, training: TrainingContext) -> None:
    ticket = methods.LotteryTicket(model, min_per_layer=1)
    early = max(1, round(_EARLY * training.steps))
    steps = 0

    def remember(loss: object) -> None:  # noqa: ARG001
        nonlocal steps
        steps += 1
        if steps == early:  # in the first training alone: `steps` is not reset
            ticket.remember()

    size, pruned = _size(model), 0
    for number in range(1, _ROUNDS + 1):
        training.train(lambda optimizer: remember)  # noqa: ARG005
        goal = count if number == _ROUNDS else round(size * (1 - (1 - count / size) ** (number / _ROUNDS)))
        ticket.next_round((goal - pruned) / (size - pruned))
        pruned = goal
    training.train()


def _dynamic(method: type[methods.SET | methods.RigL], model: nn.Module, count: int, training: TrainingContext) -> None:
    def begin(optimizer: Optimizer) -> Callable[[Callable[[], Tensor]], object]:
        steps = training.steps
        schedule = method(
            model, optimizer, sparsity=count / _size(model), end_step=max(1, 3 * steps // 4),
            update_every=max(1, steps // _UPDATES), seed=training.seed,
        )  # fmt: skip
        return schedule.step if isinstance(schedule, methods.RigL) else _step(schedule)

    training.train(begin)


CRITERIA: dict[str, Criterion] = {
    "random": Criterion.simple("random, at initialisation", "at initialisation", _random),
    "random_erk": Criterion.simple(
        "random, densities by ERK, at initialisation", "at initialisation", partial(_random, scope="erk")
    ),
    "magnitude_init": Criterion.simple("magnitude, at initialisation", "at initialisation", _magnitude),
    "snip": Criterion("SNIP, at initialisation", "at initialisation", partial(_with_data, methods.snip, 1)),
    "snip_rounds": Criterion(
        "SNIP in 20 rounds, at initialisation", "at initialisation", partial(_with_data, methods.snip, 20)
    ),
    "grasp": Criterion("GraSP, at initialisation", "at initialisation", partial(_with_data, methods.grasp, 1)),
    "synflow": Criterion("SynFlow in 100 rounds, at initialisation", "at initialisation", _synflow),
    "ticket": Criterion(
        f"lottery ticket, magnitude in {_ROUNDS} rounds", "while training", _ticket, trainings=_ROUNDS + 1
    ),
    "set": Criterion("SET, while training", "while training", partial(_dynamic, methods.SET)),
    "rigl": Criterion("RigL, while training", "while training", partial(_dynamic, methods.RigL)),
    "gradual": Criterion("gradual magnitude (GMP), while training", "while training", _gradual),
    "magnitude": Criterion.simple("magnitude, after training", "after training", _magnitude),
    "fitted": Criterion.simple("magnitude, after training; IP: in fitted bases", "after training", _fitted),
    "lamp": Criterion.simple("LAMP, after training", "after training", partial(_one_shot, methods.lamp)),
    "movement": Criterion("movement, while fine-tuning", "while training", _movement, finetunings=1),
}
