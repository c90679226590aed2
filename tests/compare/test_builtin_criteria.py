"""ip:... criteria of studies: every method takes its part in the training, and prunes exactly what it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from records import result_of
from torch import Tensor, nn

from ip_plugin import interspace, masks, prunable
from ip_plugin.adapters import Begin
from ip_plugin.adapters.torch_prune import criteria as torch_criteria
from ip_plugin.compare import builtin_criteria
from ip_plugin.compare.builtin_criteria import CRITERIA
from ip_plugin.compare.cell import epochs_of, train_and_prune
from ip_plugin.compare.config import Cell, Data, Study
from ip_plugin.compare.data import load
from ip_plugin.compare.models import NETWORKS
from ip_plugin.compare.training import Training
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.methods import Movement, apply_masks, grasp, lamp, magnitude, movement, prune, select, snip, synflow

#: Criteria as they are: some leave layers almost empty.
pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

SETTINGS = Study(training={"epochs": 1, "finetune_epochs": 1})
FEW_IMAGES = Study(training={"epochs": 1, "finetune_epochs": 1}, data={"train_images": 200})
TOTAL = 56224


def network(space: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS["convnet"](1, 10)
    return interspace(model, basis="orthonormal", sharing="model", seed=seed) if space == "interspace" else model


class Watched(Training):
    """A training that remembers the state at the beginning of each part, and the masks after each step."""

    def __init__(self, model: nn.Module, settings: Study = SETTINGS) -> None:
        images = load(Data(train_images=settings.data.train_images))
        super().__init__(model, images, settings.training, 0)
        self.parts: list[tuple[int, dict[str, Tensor], int]] = []
        self.pruned: list[int] = []
        self.masks: list[dict[str, Tensor]] = []

    def fit(self, epochs: int, lr: float, begin: Begin | None = None) -> None:
        self.parts.append((epochs, values(self.model), count(self.model)))

        def watching(optimizer: torch.optim.Optimizer) -> Callable[[Callable[[], Tensor]], object]:
            after_step = begin(optimizer) if begin else None

            def after(loss: Callable[[], Tensor]) -> None:
                if after_step:
                    after_step(loss)
                self.pruned.append(count(self.model))
                self.masks.append({name: mask.clone() for name, mask in masks(self.model).items()})

            return after

        super().fit(epochs, lr, watching)


def values(model: nn.Module) -> dict[str, Tensor]:
    coefficients = {layer.module_name: layer.parameter.detach().clone() for layer in prunable_tensors(model)}
    bases = {
        id(layer.interspace.basis): layer.interspace.basis for layer in prunable_tensors(model) if layer.interspace
    }
    return coefficients | {f"basis {n}": basis.detach().clone() for n, basis in enumerate(bases.values())}


def count(model: nn.Module) -> int:
    return sum(int((~mask).sum()) for mask in masks(model).values())


def run(name: str, model: nn.Module, number: int, settings: Study = SETTINGS) -> Watched:
    training = Watched(model, settings)
    train_and_prune(CRITERIA[name], number, training, training.images.test)
    return training


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [(name, 0.95) for name in CRITERIA] + [(name, 0.0) for name in ("random", "snip", "gradual", "rigl", "movement")],
)
def test_both_spaces_keep_equally_many_parameters(name: str, sparsity: float) -> None:
    for space in ("spatial", "interspace"):
        cell, done = Cell(f"ip:{name}", sparsity, space, 0), []
        result = result_of(cell, FEW_IMAGES, lambda _, done=done: done.append(1))
        assert (result.parameters, result.parameters_left) == (TOTAL, round((1 - sparsity) * TOTAL))
        assert result.basis_parameters == (81 if space == "interspace" else 0)
        assert len(done) == epochs_of(cell, FEW_IMAGES)
        after_training = name in ("magnitude", "fitted", "lamp")
        assert (result.accuracy_before_pruning is not None) == after_training


@pytest.mark.parametrize("name", ["random", "set", "rigl", "movement"])
def test_equal_runs_give_equal_results(name: str) -> None:
    cell = Cell(f"ip:{name}", 0.9, "interspace", 3)
    first = result_of(cell, FEW_IMAGES)
    torch.manual_seed(99)
    assert result_of(cell, FEW_IMAGES) == first


@pytest.mark.parametrize("name", ["torch:random", "ip:random"])
def test_random_pruning_does_not_look_at_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and scores from equal streams would leave negative weights only."""
    kept: list[Tensor] = []

    def watched(prune: Callable[..., object], model: nn.Module, number: int, training: Training) -> None:
        prune(model, number, training)
        kept.extend(layer.parameter.detach()[layer.mask] for layer in prunable_tensors(model) if layer.mask is not None)

    host, _, criterion = name.partition(":")
    module: Any = {"torch": torch_criteria, "ip": builtin_criteria}[host]
    original = module.CRITERIA[criterion]
    monkeypatch.setitem(module.CRITERIA, criterion, replace(original, prune=partial(watched, original.prune)))
    result_of(Cell(name, 0.9, "spatial", 0), SETTINGS)
    positive = float((torch.cat([values.flatten() for values in kept]) > 0).float().mean())
    assert 0.45 < positive < 0.55  # of 5,622


def test_random_scores_have_nothing_to_do_with_weights_of_the_same_seed() -> None:
    model = network("spatial")  # torch's seed is the one that has made the weights
    CRITERIA["random"].prune(model, 50000, Watched(model))
    kept = torch.cat(
        [layer.parameter.detach()[layer.mask] for layer in prunable_tensors(model) if layer.mask is not None]
    )
    assert 0.45 < float((kept > 0).float().mean()) < 0.55


@pytest.mark.parametrize(
    ("name", "space"),
    [*product(("snip", "grasp"), ("spatial", "interspace")), ("snip_rounds", "spatial"), ("synflow", "interspace")],
)
def test_scores_at_initialisation_choose_before_training(name: str, space: str) -> None:
    model, reference = network(space), network(space)
    training = run(name, model, 50000, FEW_IMAGES)
    assert [pruned for _, _, pruned in training.parts] == [50000] and set(training.pruned) == {50000}
    batches = Watched(reference, FEW_IMAGES).batches(10)
    assert sum(len(labels) for _, labels in batches) == 200
    score: Any = {
        "snip": partial(snip, batches=batches, loss=F.cross_entropy),
        "snip_rounds": partial(snip, batches=batches, loss=F.cross_entropy),
        "grasp": partial(grasp, batches=batches, loss=F.cross_entropy),
        "synflow": partial(synflow, example_input=batches[0][0][:1]),
    }[name]
    rounds = {"snip_rounds": 20, "synflow": 100}.get(name, 1)
    prune(reference, score, sparsity=50000 / TOTAL, rounds=rounds, min_per_layer=1)
    assert all(torch.equal(mask, masks(reference)[n]) for n, mask in masks(model).items())


@pytest.mark.parametrize(("name", "score"), [("magnitude_init", magnitude), ("magnitude", magnitude), ("lamp", lamp)])
def test_scores_without_data(name: str, score: Any) -> None:
    model, reference = network("interspace"), network("interspace")
    CRITERIA[name].prune(model, 50000, Watched(model))
    apply_masks(reference, select(score(reference), count=50000, min_per_layer=1))
    assert all(torch.equal(mask, masks(reference)[n]) for n, mask in masks(model).items())


@pytest.mark.parametrize("space", ("spatial", "interspace"))
def test_gradual_pruning_goes_on_until_three_quarters_of_the_training(space: str) -> None:
    training = run("gradual", network(space), 50000, SETTINGS.changed({"training.epochs": 4}))
    assert training.steps == len(training.pruned) == 36
    # From step 7 (a fifth) to step 27; the law is cubic, so after half of that time seven eighths are gone.
    assert training.pruned[5] == training.pruned[6] == 0 < training.pruned[7]
    assert training.pruned[16] == round(50000 * 7 / 8)
    assert training.pruned[25] < 50000 == training.pruned[26] == training.pruned[-1]


@pytest.mark.parametrize("space", ("spatial", "interspace"))
@pytest.mark.parametrize("name", ["set", "rigl"])
def test_dynamic_methods_move_until_three_quarters_and_keep_the_count(name: str, space: str) -> None:
    training = run(name, network(space), 50000, SETTINGS.changed({"training.epochs": 4}))
    assert set(training.pruned) == {50000}
    moved = [
        any(not torch.equal(now[n], before[n]) for n in now)
        for before, now in zip(training.masks, training.masks[1:], strict=False)
    ]
    assert moved[:24] == [True] * 24 and not any(moved[26:])


def test_rigl_and_set_grow_other_entries() -> None:
    ends = [run(name, network("interspace"), 50000).masks[-1] for name in ("set", "rigl")]
    assert any(not torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("space", ("spatial", "interspace"))
def test_tickets_are_rewound_with_their_bases_and_lose_more_each_time(space: str) -> None:
    model = network(space)
    start = values(model)
    training = run("ticket", model, 50000, SETTINGS.changed({"training.epochs": 2}))
    # Density d = 6224 / 56224; after rounds 1, 2 and 3 the densities are 0.4802, 0.2305 and d.
    assert [pruned for _, _, pruned in training.parts] == [0, 29228, 43262, 50000]
    first, *later = [state for _, state, _ in training.parts]
    assert all(torch.equal(first[n], start[n]) for n in start)
    # Rewound to step 1 of 18, not to the very beginning.
    assert any(not torch.equal(later[0][n], start[n]) for n in start)
    for state in later[1:]:
        assert all(torch.equal(state[n], later[0][n]) for n in state)


@pytest.mark.parametrize("space", ("spatial", "interspace"))
def test_movement_prunes_while_fine_tuning(space: str) -> None:
    model = network(space)
    training = run("movement", model, 50000, SETTINGS.changed({"training.finetune_epochs": 2}))
    assert [(epochs, pruned) for epochs, _, pruned in training.parts] == [(1, 0), (2, 0)]
    during = training.pruned[9:]
    assert set(training.pruned[:9]) == {0} and during == sorted(during) and during[-1] == 50000
    assert len(set(during)) > 5
    for name, mask in masks(model).items():  # every layer alike
        assert int(mask.sum()) == pytest.approx(mask.numel() * 6224 / TOTAL, abs=1), name


def test_movement_is_followed_at_every_step_of_the_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    update = Movement.update

    def followed(scores: Movement) -> None:
        update(scores)
        assert any(bool(total.any()) for total in scores.state_dict().values())
        updates.append(1)

    monkeypatch.setattr(Movement, "update", followed)
    run("movement", network("interspace"), 50000, SETTINGS.changed({"training.finetune_epochs": 2}))
    assert len(updates) == 18


def test_movement_without_fine_tuning_prunes_at_the_end() -> None:
    model = network("spatial")
    training = run("movement", model, 50000, SETTINGS.changed({"training.finetune_epochs": 0}))
    assert training.pruned[-1] == 0 and count(model) == 50000
    reference = network("spatial")
    again = Watched(reference)
    again.train()
    scores = movement(reference, again.batches(10), F.cross_entropy)
    apply_masks(reference, select(scores, count=50000, scope="layer", min_per_layer=1))
    assert all(torch.equal(mask, masks(reference)[n]) for n, mask in masks(model).items())


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in ("set", "rigl")])  # by ERK, all keep some
def test_no_layer_loses_everything(name: str) -> None:
    model = network("spatial")
    size = sum(getattr(*target).numel() for target in prunable(model))
    CRITERIA[name].prune(model, size - 8, Watched(model, FEW_IMAGES))
    assert sum(int(mask.sum()) for mask in masks(model).values()) == 8
    assert all(mask.any() for mask in masks(model).values())


def test_bases_have_their_own_learning_rate() -> None:
    models = {factor: network("interspace") for factor in (0.0, 1.0, 0.5)}
    for factor, model in models.items():
        Watched(model, SETTINGS.changed({"training.basis_lr": factor})).train()
    start = values(network("interspace"))["basis 0"]
    moved = {factor: float((values(model)["basis 0"] - start).norm()) for factor, model in models.items()}
    assert moved[0.0] == 0 < moved[0.5] < moved[1.0]
