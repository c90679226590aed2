"""Sensitivity: each measurement against a model that is pruned by masks, and suggestions against brute force."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import errors, interspace, masks, prunable, report, set_masks
from ip_plugin.methods import Sensitivity, lamp, prune, sensitivity, snip
from ip_plugin.methods.layer_sensitivity import Curve, Point

X = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(40) % 3
BATCHES = [(X[:20], Y[:20]), (X[20:], Y[20:])]
SPACES = ["spatial", "interspace", "masked", "host"]


def model_in(space: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 4, 3), nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    )  # fmt: skip
    if space == "interspace":
        interspace(model, basis="dct", sharing="model")
    if space == "masked":
        set_masks(model, {"4": torch.arange(216).reshape(4, 6, 3, 3) % 3 > 0})  # a third is pruned
    if space == "host":
        host.l1_unstructured(model[4], "weight", amount=72)
    return model


def mean_loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(x), y)) for x, y in BATCHES) / 2


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that a measurement could change, by value and by identity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = [(id(m), type(m), m.training, list(vars(m)), len(m._forward_pre_hooks)) for m in model.modules()]
    values = [(name, id(t), t.dtype, t.detach().reshape(-1).view(torch.uint8).tolist()) for name, t in tensors]
    return [values, modules, [id(p.grad) for p in model.parameters()], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("space", SPACES)
def test_each_measurement_is_that_of_a_copy_with_one_pruned_layer(space: str) -> None:
    model = model_in(space)
    result = sensitivity(model, batches=BATCHES, loss=F.cross_entropy, sparsities=(0.9, 0.25))
    frame = result.frame()
    assert list(frame) == ["layer", "parameters", "sparsity", "kept", "loss"]
    sizes = {"0": 54, "4": 216, "6": 48}
    assert list(frame["layer"].unique()) == list(sizes)
    for name, rows in frame.groupby("layer"):
        left = 144 if name == "4" and space in ("masked", "host") else sizes[name]
        # 0.25 is left out where a third is pruned already
        shares = [s for s in (0.25, 0.9) if sizes[name] - round(s * sizes[name]) < left]
        assert list(rows["kept"]) == [left, *(sizes[name] - round(s * sizes[name]) for s in shares)]
        for row in rows.itertuples():
            pruned = prune(model_in(space), sparsity={name: row.sparsity})
            assert report(pruned).rows[list(sizes).index(name)].nonzeros == row.kept
            assert row.loss == pytest.approx(mean_loss(pruned), rel=1e-6)
            assert row.parameters == sizes[name]


def test_the_score_chooses_the_entries() -> None:
    for score in (lamp, partial(snip, batches=BATCHES, loss=F.cross_entropy)):
        result = sensitivity(model_in("interspace"), mean_loss, sparsities=[0.8], score=score)
        _, measured = result.curves["4"].points
        pruned = prune(model_in("interspace"), score, sparsity={"4": 0.8})
        assert measured.value == pytest.approx(mean_loss(pruned), rel=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(space: str, fails: bool) -> None:
    model = model_in(space)
    model[3].eval()
    model[0].bias.grad = torch.ones(6)
    draws = []

    def evaluate(model: nn.Module) -> float:
        model.train()
        model(X).sum().backward()  # changes statistics, gradients and the random state
        model[2].note = "seen"
        draws.append(torch.rand(3).tolist())
        if fails and len(draws) == 4:
            raise KeyError("fails")
        return 0.5

    before = snapshot(model)
    if fails:
        with pytest.raises(KeyError):
            sensitivity(model, evaluate)
    else:
        sensitivity(model, evaluate)
    assert snapshot(model) == before and not hasattr(model[2], "note")
    assert len(draws) >= 4 and all(draw == draws[0] for draw in draws)


def test_gradients_are_left_on_or_off_for_the_evaluation() -> None:
    seen = []

    def evaluate(model: nn.Module) -> float:
        seen.append(torch.is_grad_enabled())
        return 1.0

    sensitivity(nn.Linear(2, 2), evaluate)
    with torch.no_grad():
        sensitivity(nn.Linear(2, 2), evaluate)
    assert set(seen[: len(seen) // 2]) == {True} and set(seen[len(seen) // 2 :]) == {False}


# Suggestions


def result_of(curves: dict[str, list[tuple[int, float]]], measure: Any = "loss", basis: int = 0) -> Sensitivity:
    """Made-up measurements; the first point of a layer has all its entries."""
    made = {name: Curve(points[0][0], tuple(Point(*point) for point in points)) for name, points in curves.items()}
    return Sensitivity(measure, made, basis)


def kept_by(result: Sensitivity, total: float) -> dict[str, int]:
    sizes = {name: curve.parameters for name, curve in result.curves.items()}
    suggested = result.suggest(total)
    kept = {
        name: sizes[name] - round(sparsity * sizes[name]) for name, sparsity in suggested.items()
    }  # as `prune` does
    assert sum(kept.values()) == round((1 - total) * sum(sizes.values())) - result.basis_parameters
    assert all(1 <= kept[name] <= curve.points[0].kept for name, curve in result.curves.items())
    return kept


def test_suggestions_worked_out_by_hand() -> None:
    # Per entry the first layer loses 1/8 and then 1, the second 1/2 all along.
    points = {"a": [(10, 1.0), (2, 2.0), (1, 3.0)], "b": [(10, 1.0), (4, 4.0), (1, 5.5)]}
    for total, kept in {0.2: [6, 10], 0.4: [2, 10], 0.6: [2, 6], 0.85: [2, 1], 0.9: [1, 1], 0.0: [10, 10]}.items():
        assert list(kept_by(result_of(points), total).values()) == kept
    # With three entries in bases 9 are left at 0.4, and 12 without
    assert kept_by(result_of(points, basis=3), 0.4) == {"a": 2, "b": 7}
    falling = {name: [(n, 100 - 10 * value) for n, value in curve] for name, curve in points.items()}
    assert kept_by(result_of(falling, "accuracy"), 0.6) == {"a": 2, "b": 6}
    # What costs nothing is taken from all layers alike: 6 and 3 of their entries
    free = {"a": [(10, 1.0), (4, 0.9), (1, 2.0)], "b": [(10, 1.0), (7, 1.0), (1, 2.0)]}
    assert kept_by(result_of(free), 0.15) == {"a": 8, "b": 9}
    assert kept_by(result_of(free), 0.45) == {"a": 4, "b": 7}
    # A point above the line between its neighbours does not count: 3 / 9 an entry, not 3 / 5
    bulge = {"a": [(10, 1.0), (5, 4.0), (1, 4.0)], "b": [(10, 1.0), (1, 4.6)]}
    assert kept_by(result_of(bulge), 0.45) == {"a": 1, "b": 10}
    # Beyond the measurements the layers lose in proportion: 5 of 19 and 99 entries
    ended = {"a": [(100, 1.0), (20, 1.5)], "b": [(100, 1.0)]}
    assert kept_by(result_of(ended), 0.4) == {"a": 20, "b": 100}
    assert kept_by(result_of(ended), 0.5) == {"a": 17, "b": 83}
    assert kept_by(result_of({"a": [(10, 1.0), (2, 1.5)], "b": [(100, 1.0)]}), 1 - 3 / 110) == {"a": 1, "b": 2}


curves = st.lists(
    st.tuples(st.integers(3, 9), st.lists(st.floats(-0.5, 3), min_size=4, max_size=4), st.integers(1, 3)),
    min_size=1, max_size=3,
)  # fmt: skip


def estimated(points: list[tuple[int, float]], kept: int) -> float:
    """The lowest chord between two measurements, the slow way."""
    losses = [(n, max(0.0, value - points[0][1])) for n, value in points]
    chords = [loss for n, loss in losses if n == kept]
    for (more, low), (fewer, high) in itertools.combinations(losses, 2):
        if fewer <= kept <= more:
            chords.append(low + (high - low) * (more - kept) / (more - fewer))
    return min(chords)


@settings(max_examples=150, deadline=None)
@given(curves, st.floats(0, 1))
def test_no_other_counts_of_entries_have_a_smaller_sum_of_losses(drawn: Any, share: float) -> None:
    points = {}
    for number, (size, values, steps) in enumerate(drawn):
        counts = [size, *range(steps, 0, -1)] if size > steps else [size]
        points[str(number)] = list(zip(counts, values, strict=False))
    result = result_of(points)
    size, least = sum(p[0][0] for p in points.values()), sum(p[-1][0] for p in points.values())
    keep = least + round(share * (size - least))
    kept = kept_by(result, 1 - keep / size)
    every = itertools.product(*(range(p[-1][0], p[0][0] + 1) for p in points.values()))
    sums = [
        sum(estimated(p, n) for p, n in zip(points.values(), counts, strict=True))
        for counts in every
        if sum(counts) == keep
    ]
    assert sum(estimated(p, kept[name]) for name, p in points.items()) == pytest.approx(min(sums))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 90), min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_higher_total_never_keeps_more_of_a_layer(values: Any) -> None:
    result = result_of({str(i): [*zip((1000, 300, 100, 20), v, strict=True)] for i, v in enumerate(values)}, "accuracy")
    before = dict.fromkeys(result.curves, 1000)
    for total in (0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999):
        kept = kept_by(result, total)
        assert all(kept[name] <= before[name] + 1 for name in kept)  # rounding moves an entry
        before = kept


@pytest.mark.parametrize("space", ["spatial", "interspace", "masked"])
def test_prune_takes_what_is_suggested(space: str) -> None:
    model = model_in(space)
    result = sensitivity(model, mean_loss, measure="loss")
    pruned = report(prune(model, sparsity=result.suggest(0.6))).prunable
    assert pruned.nonzeros + pruned.basis_parameters == round(0.4 * 318)
    assert pruned.basis_parameters == result.basis_parameters == (81 if space == "interspace" else 0)


def test_layers_without_entries_stay_so_and_count() -> None:
    model = set_masks(model_in("spatial"), {"0": torch.zeros(6, 1, 3, 3)})
    result = sensitivity(model, mean_loss, measure="loss")
    assert result.curves["0"] == Curve(54, (Point(0, mean_loss(model)),))
    suggested = result.suggest(0.5)
    assert suggested["0"] == 1.0
    assert report(prune(model, sparsity=suggested)).prunable.nonzeros == 159


# Pictures


@pytest.mark.parametrize("layers", [1, 3, 50])
def test_the_picture_has_a_line_for_each_layer(layers: int) -> None:
    result = result_of({f"layer{i}": [(100, 90.0), (50, 80.0 - i), (2, 10.0)] for i in range(layers)}, "accuracy")
    figure = result.plot()
    axes, bar = figure.axes
    assert [line.get_label() for line in axes.lines] == list(result.curves)
    assert len({line.get_color() for line in axes.lines}) == layers
    assert list(axes.lines[0].get_xdata()) == [1, 0.5, 0.02] and list(axes.lines[0].get_ydata()) == [90, 80, 10]
    left, right = axes.get_xlim()
    assert 1 < left < 2 and 0.01 < right < 0.02
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sparsity of the layer", "accuracy")
    named = [label.get_text() for label in bar.get_yticklabels()]
    assert named == list(result.curves)[:: -(-layers // 20)]
    assert result.plot(axes) is figure and len(axes.lines) == 2 * layers


# Errors

Call = Callable[[nn.Sequential], Any]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "nothing": (lambda m: sensitivity(m), errors.ArgumentError, "none of them"),
    "both": (lambda m: sensitivity(m, mean_loss, batches=BATCHES), errors.ArgumentError, "evaluate, batches"),
    "no loss": (lambda m: sensitivity(m, batches=BATCHES), errors.ArgumentError, "Found: batches\n"),
    "measure": (lambda m: sensitivity(m, mean_loss, measure="error"), errors.ArgumentError, "'error'"),  # type: ignore[arg-type]
    "sparsity": (lambda m: sensitivity(m, mean_loss, sparsities=[0.5, 90]), errors.AmountError, "90"),
    "no layer": (lambda m: sensitivity(nn.ReLU(), mean_loss), errors.SelectionError, "none in a ReLU"),
    "no number": (lambda m: sensitivity(m, lambda _: None), errors.BatchError, "None"),  # type: ignore[arg-type,return-value]
    "not finite": (lambda m: sensitivity(m, lambda _: float("nan")), errors.BatchError, "nan"),
    "no batches": (lambda m: sensitivity(m, batches=[], loss=F.cross_entropy), errors.BatchError, "empty"),
    "read once": (
        lambda m: sensitivity(m, batches=iter(BATCHES), loss=F.cross_entropy),
        errors.BatchError,
        "used up before",
    ),
    "total": (lambda m: sensitivity(m, lambda _: 1.0).suggest(90), errors.AmountError, "`total`.*\n.*90"),
    "total too high": (
        lambda m: sensitivity(m, lambda _: 1.0).suggest(0.999),
        errors.AmountError,
        "0 entries to keep in 3 layers",
    ),
    "total too high for the basis": (
        lambda m: sensitivity(interspace(copy.deepcopy(m)), lambda _: 1.0).suggest(0.5),
        errors.AmountError,
        "159 entries|besides 162 in bases",
    ),
    "total too low": (
        lambda m: sensitivity(set_masks(copy.deepcopy(m), {"0": torch.zeros(6, 1, 3, 3)}), lambda _: 1.0).suggest(0.1),
        errors.AmountError,
        "at most the 264 that are not pruned",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_user_can_get_wrong_and_nothing_changes(case: str) -> None:
    call, error, message = BAD[case]
    model = model_in("spatial")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert snapshot(model) == before


# Sparsities of layers


def test_prune_takes_names_and_targets_and_leaves_other_layers_alone() -> None:
    for space in ("spatial", "interspace"):
        model = model_in(space)
        target = prunable(model)[1]
        weight: Tensor = model[6].weight.detach().clone()
        prune(model, sparsity={"0": 0.5, target: 0.75})
        prune(model, sparsity={"0": 0.9, (model[4], "weight"): 0.8}, rounds=3)  # a target of the plain layer
        assert [row.nonzeros for row in report(model).rows] == [5, 43, 48]
        assert torch.equal(model[6].weight, weight) and "6" not in masks(model)


def test_layers_reach_their_sparsities_in_rounds() -> None:
    model, seen = model_in("masked"), []
    note = lambda: seen.append([row.nonzeros for row in report(model).rows])  # noqa: E731
    prune(model, sparsity={"0": 0.75, "4": 0.5}, rounds=2, after_round=note)
    assert seen == [[27, 144, 48], [14, 108, 48]]  # densities 0.5 and 0.71; of "4" a third is pruned before


WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a name": ({"0": 0.9, "44": 0.5}, {}, errors.SelectionError, "no prunable layer '44'.*\n.*'4'"),
    "a layer of another kind": ({"0": 0.9, "1": 0.5}, {}, errors.SelectionError, "no prunable layer '1'"),
    "a number": ({"0": 0.9, 4: 0.5}, {}, errors.SelectionError, r"no prunable layer '4 \(int\)'.*\n.*'4'"),
    "another model": ({(nn.Linear(2, 2), "weight"): 0.5}, {}, errors.SelectionError, "'weight of a Linear'"),
    "twice": (lambda m: {"0": 0.9, (m[0], "weight"): 0.5}, {}, errors.SelectionError, "layer '0'"),
    "no fraction": ({"0": 0.9, "4": 90}, {}, errors.AmountError, r"`sparsity\['4'\]`.*\n.*90"),
    "nothing": ({}, {}, errors.SelectionError, "an empty mapping"),
    "below the present one": (
        {"0": 0.9, "4": 0.3},
        {"rounds": 5},
        errors.AmountError,
        "'4'.*\n.*151 entries of 216; 144",
    ),
    "a scope": ({"0": 0.9}, {"scope": "layer"}, errors.ArgumentError, "'layer'"),
    "a minimum": ({"0": 0.9, "4": 0.99}, {"min_per_layer": 3, "rounds": 2}, errors.AmountError, "2 entries kept"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sparsities_of_layers_are_checked_before_anything_changes(case: str) -> None:
    sparsity, options, error, message = WRONG[case]
    model = model_in("masked")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        prune(model, sparsity=sparsity(model) if callable(sparsity) else sparsity, **options)
    assert snapshot(model) == before
