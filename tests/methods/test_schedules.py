"""Schedules: exact counts at every step, in both spaces; a run that is resumed is the run that was not stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import bake, interspace, masks, prunable, report, set_masks
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import AlreadySparserError, InvalidAmountError, InvalidLossError, InvalidScheduleError
from ip_plugin.methods import SET, Gradual, LotteryTicket, RigL, erk, magnitude, prune, snip, synflow

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning"),  # random weights, one threshold
]

SPACES = ["spatial", "interspace", "moved"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


SIZES = [72, 576, 48, 18]
TOTAL = sum(SIZES)
X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def model_in(space: str) -> nn.Sequential:
    model = network()
    if space != "spatial":
        interspace(model, basis="dct", sharing="model", constraint="none" if space == "moved" else "unit")
    if space == "moved":
        with torch.no_grad():
            basis = next(p for name, p in model.named_parameters() if name.endswith("basis"))
            basis.mul_(torch.linspace(0.3, 3, 9)[:, None])
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def loss_of(model: nn.Module, index: int = 0) -> Tensor:
    part = slice(8 * (index % 3), 8 * (index % 3) + 8)
    return F.cross_entropy(model(X[part]), Y[part])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, schedule: Any = None) -> None:
    for index in steps:
        optimizer.zero_grad()
        loss_of(model, index).backward()
        optimizer.step()
        if isinstance(schedule, RigL):
            schedule.step(lambda i=index: loss_of(model, i))
        elif schedule is not None:
            schedule.step()


def left(model: nn.Module) -> int:
    return sum(int(mask.sum()) for mask in masks(model).values())


# Once and in rounds


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rounds", [1, 7])
def test_pruning_reaches_the_exact_count(space: str, rounds: int) -> None:
    scores = {
        "magnitude": magnitude,
        "snip": partial(snip, batches=[(X, Y)], loss=F.cross_entropy),
        "synflow": partial(synflow, example_input=X[:1]),
    }
    for score in scores.values():
        model = prune(model_in(space), score, sparsity=0.9, rounds=rounds, min_per_layer=1)
        assert left(model) == TOTAL - round(0.9 * TOTAL)


def test_rounds_score_anew_what_is_left() -> None:
    """Densities fall by a geometric law, and each round sees the masks of those before."""
    model, seen = network(), []

    def score(model: nn.Module) -> Any:
        found = magnitude(model)
        seen.append(sum(int((s > -math.inf).sum()) for s in found.values()))
        return found

    prune(model, score, sparsity=0.75, rounds=2)
    assert seen == [TOTAL, TOTAL - round(0.5 * TOTAL)]
    prune(model, score, sparsity=0.9, rounds=3, min_per_layer=1)  # the first round would leave more than there is
    assert seen[2:4] == [TOTAL - round(0.75 * TOTAL)] * 2
    assert left(model) == TOTAL - round(0.9 * TOTAL)
    with pytest.raises(AlreadySparserError):
        prune(model, sparsity=0.5)


# Gradual


@pytest.mark.parametrize("space", SPACES)
def test_gradual_pruning_follows_the_cubic_law_exactly(space: str) -> None:
    model = model_in(space)
    optimizer = sgd(model)
    schedule = Gradual(model, sparsity=0.9, begin_step=2, end_step=10, update_every=3, initial=0.1, min_per_layer=1)
    counts, changed = [], []
    for index in range(12):
        train(model, optimizer, range(index, index + 1))
        changed.append(schedule.step())
        counts.append(left(model) or TOTAL)
    # Steps 2, 5, 8 and the last, 10: 0, 3/8, 6/8 and all of the way.
    assert changed == [step in (2, 5, 8, 10) for step in range(1, 13)]
    law = [0.9 + (0.1 - 0.9) * (1 - t) ** 3 for t in (0, 3 / 8, 6 / 8, 1)]
    expected = [TOTAL - round(s * TOTAL) for s in law]
    assert [counts[step - 1] for step in (2, 5, 8, 10)] == expected
    assert counts[0] == TOTAL
    assert counts[-1] == expected[-1]


def test_gradual_pruning_leaves_what_is_sparser_already() -> None:
    model = set_masks(network(), {"3": torch.rand(8, 8, 3, 3) < 0.1})
    before = {name: mask.clone() for name, mask in masks(model).items()}
    schedule = Gradual(model, sparsity=0.9, end_step=10)
    assert not schedule.step()
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())


# Lottery tickets


@pytest.mark.parametrize("space", SPACES)
def test_a_ticket_rewinds_everything_but_the_masks(space: str) -> None:
    model = model_in(space)
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    early = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    parameters = {id(p) for p in model.parameters()}
    ticket = LotteryTicket(model, optimizer)
    size = TOTAL
    for _ in range(3):
        train(model, optimizer, range(3, 9))
        trained = {layer.module_name: layer.parameter.detach().clone() for layer in prunable_tensors(model)}
        ticket.next_round(fraction=0.2)
        size -= round(0.2 * size)
        assert left(model) == size
        assert {id(p) for p in model.parameters()} == parameters
        plain = {name.replace(".parametrizations.weight.original", ".weight"): value
                 for name, value in early[0].items()}  # fmt: skip
        for name, value in model.state_dict().items():
            if not name.endswith("mask"):
                assert torch.equal(value, plain[name.replace(".parametrizations.weight.original", ".weight")]), name
        for now, then in zip(optimizer.state_dict()["state"].values(), early[1]["state"].values(), strict=True):
            assert torch.equal(now["momentum_buffer"], then["momentum_buffer"])
    assert any(
        not torch.equal(value, layer.parameter) for value, layer in zip(trained.values(), prunable_tensors(model))
    )


def test_a_ticket_prunes_by_the_trained_values_and_not_by_those_it_rewinds_to() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    ticket = LotteryTicket(model)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    ticket.next_round(fraction=0.5)
    assert masks(model)[""].tolist() == [[False, False, True, True]]
    assert model.weight.tolist() == [[0, 0, 2.0, 1.0]]


# Dynamic sparse training


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("cls", [SET, RigL])
def test_dynamic_training_keeps_counts_and_zeros(cls: Any, space: str) -> None:
    model = model_in(space)
    optimizer = sgd(model)
    schedule = cls(model, optimizer, sparsity=0.8, end_step=40, update_every=4, drop_fraction=0.5)
    sizes = {layer.module_name: int(layer.mask.sum()) for layer in prunable_tensors(model)}
    assert sum(sizes.values()) == TOTAL - round(0.8 * TOTAL)
    shapes = [tuple(layer.parameter.shape) for layer in prunable_tensors(model)]
    assert list(sizes.values()) == pytest.approx(
        [d * n for d, n in zip(erk(shapes, 1 - round(0.8 * TOTAL) / TOTAL), SIZES, strict=True)], abs=1
    )
    seen = {name: mask.clone() for name, mask in masks(model).items()}
    moved = 0
    for index in range(44):
        train(model, optimizer, range(index, index + 1), schedule)
        now = masks(model)
        changed = any(not torch.equal(now[name], seen[name]) for name in now)
        assert not changed or (index + 1 < 40 and (index + 1) % 4 == 0)
        moved += changed
        seen = now
        for layer in prunable_tensors(model):
            assert int(layer.mask.sum()) == sizes[layer.module_name]
            for tensor in (layer.parameter, optimizer.state[layer.parameter]["momentum_buffer"]):
                assert not tensor[~layer.mask].any()
    assert moved >= 5
    assert bake(model)(X).shape == (24, 3)


@pytest.mark.parametrize("space", SPACES)
def test_rigl_grows_the_largest_dense_gradients_in_unit_gauge(space: str) -> None:
    """Against the gradient of an explicit formula: the kernel as coefficients times basis, without any mask."""
    model = model_in(space).eval().double()
    x = X.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = RigL(model, optimizer, sparsity=0.5, end_step=10**6, update_every=1, drop_fraction=0.4, scope="layer")
    before = masks(model)
    conv = model[3]
    parametrization = conv.parametrizations.weight[0]
    coefficients = conv.parametrizations.weight.original.detach().clone()
    basis = torch.eye(9, dtype=torch.float64) if space == "spatial" else parametrization.effective_basis.detach()
    dense = coefficients.clone().requires_grad_()
    kernel = (dense.reshape(64, 9) @ basis).reshape(8, 8, 3, 3)
    hidden = F.relu(F.conv2d(model[:3](x), kernel, conv.bias))
    F.cross_entropy(model[5:](hidden), Y).backward()
    norms = basis.norm(dim=1).reshape(3, 3)
    growth = (dense.grad / norms).abs()
    assert schedule.step(lambda: F.cross_entropy(model(x), Y))
    after = masks(model)["3"]
    count = int(schedule.fraction_now * int(before["3"].sum()))
    strength = (coefficients * norms).abs().masked_fill(~before["3"], math.inf).flatten()
    stays = before["3"].flatten().clone()
    stays[strength.argsort()[:count]] = False
    expected = stays.clone()
    expected[growth.flatten().masked_fill(stays, -1).argsort(descending=True)[:count]] = True
    assert torch.equal(after.flatten(), expected)
    assert count > 50
    grown = after & ~stays.reshape(after.shape)
    assert not conv.parametrizations.weight.original[grown].any()


def test_an_update_leaves_gradients_statistics_and_random_state() -> None:
    model = model_in("interspace")
    optimizer = sgd(model)
    schedule = RigL(model, optimizer, sparsity=0.5, end_step=100, update_every=1)
    loss_of(model).backward()
    for layer in prunable_tensors(model):
        layer.parameter.grad.masked_fill_(~layer.mask, 0)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers() if not name.endswith("mask")}
    state = torch.get_rng_state()
    assert schedule.step(lambda: loss_of(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers() if name in buffers)
    kept = {layer.module_name: layer for layer in prunable_tensors(model)}
    for name, p in model.named_parameters():
        mine = [layer.mask for layer in kept.values() if layer.parameter is p]
        assert torch.equal(p.grad, gradients[name] if not mine else torch.where(p == 0, 0, gradients[name]))


@pytest.mark.parametrize("cls", [SET, RigL])
def test_what_comes_starts_at_zero_whatever_lay_behind_the_mask(cls: Any) -> None:
    model = model_in("moved")
    optimizer = sgd(model)
    schedule = cls(model, optimizer, sparsity=0.5, end_step=100, update_every=1, drop_fraction=0.5)
    train(model, optimizer, range(1))
    before = masks(model)
    with torch.no_grad():
        for layer in prunable_tensors(model):
            layer.parameter.masked_fill_(~layer.mask, 5.0)
            optimizer.state[layer.parameter]["momentum_buffer"].masked_fill_(~layer.mask, 5.0)
    assert schedule.step(*([lambda: loss_of(model)] if cls is RigL else []))
    grown = {name: mask & ~before[name] for name, mask in masks(model).items()}
    assert sum(int(each.sum()) for each in grown.values()) > 20
    for layer in prunable_tensors(model):
        for tensor in (layer.parameter, optimizer.state[layer.parameter]["momentum_buffer"]):
            assert not tensor[grown[layer.module_name]].any() and tensor[before[layer.module_name] & layer.mask].any()


def test_large_layers_of_half_precision() -> None:
    model = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    schedule = RigL(model, sgd(model), sparsity=0.9, end_step=100, update_every=1)
    before = masks(model)[""]
    assert schedule.step(lambda: model(torch.randn(4, 512, dtype=torch.bfloat16)).float().square().mean())
    assert int(masks(model)[""].sum()) == int(before.sum()) and not torch.equal(masks(model)[""], before)


def test_nothing_moves_from_the_end_on() -> None:
    model = model_in("interspace")
    optimizer = sgd(model)
    schedule = SET(model, optimizer, sparsity=0.5, end_step=3, update_every=1)
    assert [schedule.step() for _ in range(5)] == [True, True, False, False, False]


def test_masks_have_nothing_to_do_with_initial_weights_of_the_same_seed() -> None:
    torch.manual_seed(0)
    model = nn.Linear(100, 100, bias=False)
    SET(model, sgd(model), sparsity=0.9, end_step=100, seed=0)
    kept = model.weight.detach()[masks(model)[""]]
    assert 0.45 < float((kept > 0).float().mean()) < 0.55  # of 1000


@pytest.mark.parametrize("bad", [torch.tensor(math.nan), torch.ones(2), 1.0])
def test_a_loss_that_is_none_moves_nothing(bad: Any) -> None:
    model = model_in("interspace")
    schedule = RigL(model, sgd(model), sparsity=0.5, end_step=100, update_every=1)
    before, steps = masks(model), schedule.steps
    with pytest.raises(InvalidLossError):
        schedule.step(lambda: bad)
    assert schedule.steps == steps
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())


def test_masks_that_are_there_are_taken() -> None:
    model = model_in("interspace")
    host.random_unstructured(*prunable(model)[1], amount=0.5)
    expected = masks(model)["3"].clone()
    schedule = SET(model, sgd(model), end_step=100, update_every=1)
    assert torch.equal(masks(model)["3"], expected)
    assert not prunable(model)[1][0].original[~expected].any()
    assert schedule.step()
    assert left(model) == 288
    assert not torch.equal(masks(model)["3"], expected)


def test_the_share_that_moves_falls_by_a_cosine() -> None:
    model = nn.Linear(100, 10)
    schedule = SET(model, sgd(model), sparsity=0.5, end_step=8, update_every=1, drop_fraction=0.4)
    shares = []
    for _ in range(8):
        before = masks(model)[""]
        schedule.step()
        shares.append((int((before & ~masks(model)[""]).sum()), schedule.fraction_now))
    law = [0.2 * (1 + math.cos(math.pi * t / 8)) for t in range(1, 9)]
    assert [share for _, share in shares] == pytest.approx(law)
    assert shares[7][0] == 0
    assert all(moved <= int(500 * share) for moved, share in shares)  # what was dropped may come again


# Resuming


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["gradual", "set", "rigl"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind: str, space: str) -> None:
    def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        if kind == "gradual":
            return Gradual(model, sparsity=0.9, end_step=20, update_every=2, min_per_layer=1)
        return {"set": SET, "rigl": RigL}[kind](model, optimizer, sparsity=0.8, end_step=30, update_every=3)

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = model_in(space)
        optimizer = sgd(model)
        return model, optimizer, make(model, optimizer)

    model, optimizer, schedule = start()
    train(model, optimizer, range(11), schedule)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict(), torch.get_rng_state()))
    train(model, optimizer, range(11, 24), schedule)

    other, other_optimizer, other_schedule = start()
    if kind == "gradual":  # masks that the state has are made
        set_masks(other, {layer.module_name: torch.ones_like(layer.parameter) for layer in prunable_tensors(other)})
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    other_schedule.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    train(other, other_optimizer, range(11, 24), other_schedule)
    for (name, value), other_value in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, other_value), name


def test_a_resumed_ticket_rewinds_to_the_same_state() -> None:
    model = model_in("interspace")
    optimizer = sgd(model)
    ticket = LotteryTicket(model, optimizer)
    train(model, optimizer, range(4))
    ticket.next_round()
    saved = copy.deepcopy((model.state_dict(), ticket.state_dict()))
    train(model, optimizer, range(4))
    ticket.next_round()

    other = model_in("interspace")
    other_optimizer = sgd(other)
    set_masks(other, {layer.module_name: torch.ones_like(layer.parameter) for layer in prunable_tensors(other)})
    other.load_state_dict(saved[0])
    other_ticket = LotteryTicket(other, other_optimizer)
    other_ticket.load_state_dict(saved[1])
    other_ticket.rewind()
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(list(other.parameters()), list(model.parameters()), strict=True))
    with pytest.raises(InvalidScheduleError, match="state_dict"):
        LotteryTicket(nn.Linear(2, 2)).load_state_dict(saved[1])


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: prune(m, sparsity=1.5), InvalidAmountError, "1.5"),
        (lambda m: prune(m, sparsity=math.nan), InvalidAmountError, "nan"),
        (lambda m: prune(m, sparsity=0.5, rounds=0), InvalidScheduleError, "rounds"),
        (lambda m: Gradual(m, sparsity=2, end_step=3), InvalidAmountError, "2"),
        (lambda m: Gradual(m, sparsity=0.5, end_step=3, begin_step=3), InvalidScheduleError, "`end_step`.*4"),
        (lambda m: Gradual(m, sparsity=0.5, end_step=3, update_every=0), InvalidScheduleError, "every"),
        (lambda m: Gradual(m, sparsity=0.5, end_step=3, initial=0.6), InvalidScheduleError, "initial"),
        (lambda m: LotteryTicket(m).next_round(1.2), InvalidScheduleError, "fraction"),
        (lambda m: SET(m, sgd(m), end_step=3), InvalidAmountError, "no layer of the model has a mask"),
        (
            lambda m: Gradual(m, sparsity=0.5, end_step=3, initial=-1),
            InvalidAmountError,
            "`initial` must be a fraction",
        ),
        (lambda m: SET(m, sgd(m), sparsity=0.5, end_step=0), InvalidScheduleError, "end"),
        (lambda m: RigL(m, sgd(m), sparsity=0.5, end_step=5, drop_fraction=True), InvalidScheduleError, "fraction"),
        (lambda m: RigL(m, sgd(m), sparsity=-1, end_step=5), InvalidAmountError, "-1"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(make: Callable[[Any], Any], error: Any, message: str) -> None:
    model = model_in("interspace")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        make(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    assert report(model).prunable.nonzeros == TOTAL


def test_something_can_be_done_after_each_round_that_prunes() -> None:
    model = network()
    seen: list[int] = []
    prune(model, sparsity=0.75, rounds=2, after_round=lambda: seen.append(report(model).prunable.nonzeros))
    assert seen == [TOTAL - round(0.5 * TOTAL), TOTAL - round(0.75 * TOTAL)]
    seen.clear()
    prune(model, sparsity=0.84, rounds=4, after_round=lambda: seen.append(report(model).prunable.nonzeros))
    assert len(seen) == 1  # the others would leave more than there is
