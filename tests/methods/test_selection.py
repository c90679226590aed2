"""Selection: exact counts, scopes, ties, floors and patterns; literals worked out by hand, and slow oracles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import errors, interspace, masks, methods, prunable, set_masks
from ip_plugin.core.tensor_ref import prunable_tensors

INF = math.inf


def scores_of(*lists: Any) -> methods.Scores:
    """Scores of linear layers, one for each nested list; of convolutions for tensors."""
    tensors = [each if isinstance(each, Tensor) else torch.tensor(each).float() for each in lists]
    return {(nn.Module(), f"t{i}"): tensor for i, tensor in enumerate(tensors)}


def kept(found: methods.Masks) -> list[list[int]]:
    return [mask.flatten().int().tolist() for mask in found.values()]


def counts(found: methods.Masks) -> list[int]:
    return [int(mask.sum()) for mask in found.values()]


THREE = scores_of([[5.0, -1.0, 3.0, 2.0]], [[4.0], [-2.0]], [[0.5, 6.0]])
LITERALS: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "global": ({"count": 5}, [[1, 0, 0, 0], [1, 0], [0, 1]]),
    "global sparsity": ({"sparsity": 0.5}, [[1, 0, 1, 0], [1, 0], [0, 1]]),
    "nothing": ({"sparsity": 0.0}, [[1, 1, 1, 1], [1, 1], [1, 1]]),
    "everything": ({"sparsity": 1}, [[0, 0, 0, 0], [0, 0], [0, 0]]),
    "all but one": ({"count": 7}, [[0, 0, 0, 0], [0, 0], [0, 1]]),
    "layer": ({"sparsity": 0.5, "scope": "layer"}, [[1, 0, 1, 0], [1, 0], [0, 1]]),
    # 3 of 8: shares 1.5, 0.75, 0.75; the largest remainders get one each
    "layer with remainders": ({"count": 5, "scope": "layer"}, [[1, 0, 0, 0], [1, 0], [0, 1]]),
    # 5 of 8: shares 2.5, 1.25, 1.25
    "layer with another remainder": ({"count": 3, "scope": "layer"}, [[1, 0, 1, 1], [1, 0], [0, 1]]),
    # weights 1 + 4, 2 + 1, 1 + 2; 6 kept: 30/11, 18/11, 18/11, so 2.7, 1.6, 1.6, and the floors 2, 1, 1 miss two
    "erk": ({"count": 2, "scope": "erk"}, [[1, 0, 1, 1], [1, 1], [0, 1]]),
    # 7 kept: 35/11, 21/11, 21/11: the floors 3, 1, 1 miss two
    "erk nearly dense": ({"count": 1, "scope": "erk"}, [[1, 0, 1, 1], [1, 1], [1, 1]]),
    # the largest two would be 6 and 5
    "min_per_layer": ({"count": 5, "min_per_layer": 1}, [[1, 0, 0, 0], [1, 0], [0, 1]]),
    "floor of two": ({"count": 2, "min_per_layer": 2}, [[1, 0, 1, 0], [1, 1], [1, 1]]),
}


@pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")
@pytest.mark.parametrize("case", LITERALS)
def test_masks_worked_out_by_hand(case: str) -> None:
    arguments, expected = LITERALS[case]
    found = methods.select(THREE, **arguments)
    assert kept(found) == expected
    assert list(found) == list(THREE)
    for mask, score in zip(found.values(), THREE.values(), strict=True):
        assert mask.dtype == torch.bool and mask.shape == score.shape


def test_a_floor_saves_the_best_entry_of_a_layer_and_without_it_there_is_a_warning() -> None:
    scores = scores_of([[1.0, 3.0, 2.0]], [[10.0, 12.0, 11.0, 13.0]])
    with pytest.warns(
        errors.LayerCollapseWarning, match=r"together: t0 of shape \(1, 3\)\. .*LAMP.*min_per_layer="
    ) as w:
        assert kept(methods.select(scores, count=4)) == [[0, 0, 0], [0, 1, 1, 1]]
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept(methods.select(scores, count=4, min_per_layer=1)) == [[0, 1, 0], [0, 1, 0, 1]]
        assert kept(methods.select(scores, count=3, min_per_layer=2)) == [[0, 1, 1], [0, 1, 0, 1]]
        methods.select(scores, sparsity=1.0)  # asked for
        gone = scores_of([[-INF, -INF, -INF]], [[10.0, 12.0, 11.0, 13.0]])
        assert kept(methods.select(gone, count=4, min_per_layer=1)) == [
            [0, 0, 0],
            [0, 1, 1, 1],
        ]  # nothing was left before


def test_layers_with_less_than_a_tenth_of_the_common_share_are_warned_of() -> None:
    """Of 100 and 1,000 entries 220 are kept, a fifth; a tenth of it, two in a hundred entries, is no reason yet."""
    for few in (1, 2, 3):
        first = torch.cat([torch.full((few,), 2.0), torch.zeros(100 - few)])[None]
        second = torch.cat([torch.full((220 - few,), 2.0), torch.zeros(780 + few)])[None]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert counts(methods.select(scores_of(first, second), count=880)) == [few, 220 - few]
        assert [each.category for each in caught] == [errors.LayerCollapseWarning] * (few < 2)


@pytest.mark.parametrize("scope", ["layer", "erk"])
def test_floors_hold_in_every_scope(scope: Any) -> None:
    scores = scores_of(torch.rand(1, 2), torch.rand(30, 30))
    with pytest.warns(errors.LayerCollapseWarning):
        assert counts(methods.select(scores, count=901, scope=scope)) == [0, 1]
    assert counts(methods.select(scores, count=892, scope=scope, min_per_layer=2)) == [2, 8]


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_pruned_entries_stay_pruned_and_count(scope: Any) -> None:
    scores = scores_of([[1.0, 2.0, -INF, -INF]], [[-INF, -INF, -INF, 0.5]], [[0.1, 0.2], [0.3, 0.4]])
    found = methods.select(scores, count=6, scope=scope, min_per_layer=1)
    assert sum(counts(found)) == 6
    for mask, score in zip(found.values(), scores.values(), strict=True):
        assert not mask[score == -INF].any()
    # 7 entries are left; each scope gives what a layer cannot hold to the others
    assert counts(methods.select(scores, count=5, scope=scope)) == [2, 1, 4]
    with pytest.raises(errors.AlreadySparserError, match="8 entries to keep, 7 that are not pruned"):
        methods.select(scores, count=4, scope=scope)


def test_equal_scores_are_taken_evenly_from_layers_and_positions() -> None:
    sizes = [(10, 10, 3, 3), (100, 10, 3, 3), (1000, 9), (1, 1, 3, 3)]
    scores = scores_of(*(torch.zeros(shape) for shape in sizes))
    found = methods.select(scores, sparsity=0.9)
    assert sum(counts(found)) == 1891
    for mask in found.values():
        assert abs(int(mask.sum()) - 0.1 * mask.numel()) <= 2
    positions = list(found.values())[1].flatten(2).float().mean((0, 1))
    assert positions.min() > 0.08 and positions.max() < 0.12
    again = methods.select(scores, sparsity=0.9)
    assert all(torch.equal(found[where], again[where]) for where in found)


def test_ties_at_the_threshold_only_are_told_apart() -> None:
    scores = scores_of([[3.0, 1.0, 1.0, 0.0]], [[1.0, 2.0, 1.0, 0.0]])
    found = methods.select(scores, count=4)
    assert sum(counts(found)) == 4
    assert [int(mask[score > 1].sum()) for mask, score in zip(found.values(), scores.values(), strict=True)] == [1, 1]
    assert not any(mask[score < 1].any() for mask, score in zip(found.values(), scores.values(), strict=True))


tensors = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.integers(0, 3)), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(tensors, st.floats(0, 1), st.sampled_from(["global", "layer", "erk"]), st.integers(0, 2))
def test_counts_are_exact_and_the_best_are_kept(listed: Any, amount: float, scope: Any, min_per_layer: int) -> None:
    drawn = []
    for rows, columns, seed, gone in listed:
        generator = torch.Generator().manual_seed(seed)
        score = torch.randint(-3, 4, (rows, columns), generator=generator).float()
        score[torch.rand(rows, columns, generator=generator) < gone / 10] = -INF
        drawn.append(score)
    scores = scores_of(*drawn)
    size = sum(score.numel() for score in drawn)
    left = [int((score > -INF).sum()) for score in drawn]
    least = [min(min_per_layer, n) for n in left]
    keep = sum(least) + round(amount * (sum(left) - sum(least)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.LayerCollapseWarning)
        found = methods.select(scores, count=size - keep, scope=scope, min_per_layer=min_per_layer)
    assert sum(counts(found)) == keep
    per_layer = list(zip(found.values(), drawn, least, strict=True))
    for mask, score, lowest in per_layer:
        assert not mask[score == -INF].any()
        assert int(mask.sum()) >= lowest
        if mask.any() and not mask.all():
            assert score[mask].min() >= score[~mask].max()
    if scope == "global":
        free = [score[mask] for mask, score, lowest in per_layer if int(mask.sum()) > lowest]
        lost = torch.cat([score[~mask] for mask, score, _ in per_layer])
        if free and len(lost):
            assert torch.cat(free).min() >= lost.max()


def test_integer_and_half_precision_scores_are_ranked() -> None:
    assert kept(methods.select(scores_of(torch.tensor([[3, 1, 2]])), count=1)) == [[1, 0, 1]]
    half = scores_of(torch.tensor([[3.0, 1.0, 2.0]]).half(), torch.tensor([[2.5]]).double())
    assert kept(methods.select(half, count=2, min_per_layer=1)) == [[1, 0, 0], [1]]


# ERK


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's convolutions and its classifier, after He et al. 2016."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, channels, 1, 1)] if block == 0 else []
            channels = 4 * width
    return [*shapes, (1000, 2048)]


def vgg16() -> list[tuple[int, ...]]:
    """Shapes of VGG-16, after Simonyan and Zisserman 2015."""
    shapes: list[tuple[int, ...]] = []
    channels = 3
    for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes.append((width, channels, 3, 3))
        channels = width
    return [*shapes, (4096, 25088), (4096, 4096), (1000, 4096)]


def by_bisection(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """The densities ``min(1, factor * sum / prod)`` whose average is `density`: the slow, obvious way."""
    low, high = 0.0, 1e9
    for _ in range(200):
        factor = (low + high) / 2
        found = [min(1.0, factor * sum(shape) / math.prod(shape)) for shape in shapes]
        entries = sum(d * math.prod(shape) for d, shape in zip(found, shapes, strict=True))
        low, high = (factor, high) if entries < density * sum(map(math.prod, shapes)) else (low, factor)
    return found


def test_erk_of_small_shapes_worked_out_by_hand() -> None:
    # 26 entries for weights 4, 20: the first would get 8.7 of its 4, so the second gets the other 48 of its 100.
    assert methods.erk([(2, 2), (10, 10)], 0.5) == pytest.approx([1, 0.48])
    # 56 of 407 for weights 2, 5, 40: 2.4 > 1, then 55 for 5, 40: 6.1 > 6, then 49 of 400.
    assert methods.erk([(1, 1), (2, 3), (20, 20)], 56 / 407) == pytest.approx([1, 1, 0.1225])
    # kernels count by their sides: (2 + 2 + 3 + 3) / 36 against (6 + 6) / 36
    assert methods.erk([(2, 2, 3, 3), (6, 6)], 22 / 72) == pytest.approx([10 / 36, 12 / 36])
    assert methods.erk([(3, 3), (5, 7)], 1.0) == [1.0, 1.0]
    assert methods.erk([(3, 3), (5, 7)], 0.0) == [0.0, 0.0]


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05, 0.02])
@pytest.mark.parametrize(("shapes", "entries"), [(resnet50(), 25_502_912), (vgg16(), 138_344_128)])
def test_erk_of_real_networks_by_bisection(shapes: list[tuple[int, ...]], entries: int, density: float) -> None:
    assert sum(map(math.prod, shapes)) == entries
    found = methods.erk(shapes, density)
    assert found == pytest.approx(by_bisection(shapes, density))
    assert math.fsum(d * math.prod(s) for d, s in zip(found, shapes, strict=True)) == pytest.approx(density * entries)


def test_erk_of_resnet50_and_vgg16_worked_out_by_hand() -> None:
    # ResNet-50's sides sum to 52 321. At 5 % nothing is dense: 0.05 * 25 502 912 / 52 321 = 24.3716 for each unit.
    found = methods.erk(resnet50(), 0.05)
    assert found[0] == pytest.approx(24.3716 * 81 / 9408, rel=1e-5)  # 0.2098, (64, 3, 7, 7)
    assert found[1] == pytest.approx(24.3716 * 130 / 4096, rel=1e-5)  # 0.7735, (64, 64, 1, 1)
    assert found[-1] == pytest.approx(24.3716 * 3048 / 2_048_000, rel=1e-5)  # 0.0363, (1000, 2048)
    # At 10 % the first (64, 64, 1, 1) is (48.743 * 130 / 4096 = 1.55), which leaves 48.7861 for each unit.
    found = methods.erk(resnet50(), 0.1)
    assert [i for i, d in enumerate(found) if d == 1] == [1]
    assert found[0] == pytest.approx(48.7861 * 81 / 9408, rel=1e-5)  # 0.4200
    assert found[2] == pytest.approx(48.7861 * 134 / 36_864, rel=1e-5)  # 0.1773, (64, 64, 3, 3)
    # VGG-16's sides sum to 50 489; at 10 % its first layer is dense (274.01 * 73 / 1728 = 11.6): 274.3709 are left.
    found = methods.erk(vgg16(), 0.1)
    assert [i for i, d in enumerate(found) if d == 1] == [0]
    assert found[1] == pytest.approx(274.3709 * 134 / 36_864, rel=1e-5)  # 0.9973, (64, 64, 3, 3)
    assert found[13] == pytest.approx(274.3709 * 29_184 / 102_760_448, rel=1e-5)  # 0.0779, (4096, 25088)


def test_selection_by_erk_keeps_what_the_densities_say() -> None:
    shapes = [shape for shape in resnet50() if math.prod(shape) < 40_000]
    generator = torch.Generator().manual_seed(0)
    scores = scores_of(*(torch.rand(shape, generator=generator) for shape in shapes))
    size = sum(map(math.prod, shapes))
    found = counts(methods.select(scores, sparsity=0.8, scope="erk"))
    assert sum(found) == size - round(0.8 * size)
    for n, density, shape in zip(found, methods.erk(shapes, 0.2), shapes, strict=True):
        assert abs(n - density * math.prod(shape)) <= 1


# Patterns


def test_patterns_worked_out_by_hand() -> None:
    linear = scores_of([[1.0, 3.0, 2.0, 0.0, 4.0, 4.0, 4.0, 4.0]])
    assert kept(methods.select(linear, pattern=methods.NofM(2, 4))) == [[0, 1, 1, 0, 1, 1, 0, 0]]
    # 2 input channels of a kernel of 3: along the input, each position has a group (of the two channels)
    conv = scores_of(torch.tensor([[[1.0, 5.0, 2.0], [3.0, 4.0, 6.0]]]))
    assert kept(methods.select(conv, pattern=methods.NofM(1, 2, "input"))) == [[0, 1, 0, 1, 0, 1]]
    assert kept(methods.select(conv, pattern=methods.NofM(1, 3, "kernel"))) == [[0, 1, 0, 0, 0, 1]]
    gone = scores_of([[-INF, -INF, -INF, 1.0]])
    assert kept(methods.select(gone, pattern=methods.NofM(2, 4))) == [[0, 0, 0, 1]]


def test_of_equal_scores_in_a_group_the_first_are_kept() -> None:
    scores = {(nn.Linear(1, 1), "weight"): torch.ones(3, 64)}
    (mask,) = methods.select(scores, pattern=methods.NofM(20, 64)).values()
    assert mask[:, :20].all() and not mask[:, 20:].any()


@pytest.mark.parametrize("pattern", [methods.NofM(2, 4), methods.NofM(1, 8), methods.NofM(3, 9, "kernel")])
def test_every_group_keeps_its_n_best(pattern: methods.NofM) -> None:
    score = torch.randn(5, 8, 3, 3)
    [mask] = methods.select(scores_of(score), pattern=pattern).values()
    assert mask.is_contiguous()
    for o in range(5):
        if pattern.along == "kernel":
            rows = [(score[o, i].flatten(), mask[o, i].flatten()) for i in range(8)]
        else:
            rows = [(score[o, :, y, x], mask[o, :, y, x]) for y in range(3) for x in range(3)]
        for row in rows:
            for values, kept_here in zip(*(part.split(pattern.m) for part in row), strict=True):
                assert int(kept_here.sum()) == pattern.n
                assert values[kept_here].min() > values[~kept_here].max()


# Errors

Call = Callable[[], Any]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "no scores": (lambda: methods.select({}, sparsity=0.5), errors.NothingToPruneError, "empty"),
    "no amount": (lambda: methods.select(THREE), errors.InvalidAmountError, "None"),
    "two amounts": (lambda: methods.select(THREE, sparsity=0.5, count=4), errors.InvalidAmountError, "=0.5, count=4"),
    "above 1": (lambda: methods.select(THREE, sparsity=1.5), errors.InvalidAmountError, "1.5"),
    "below 0": (lambda: methods.select(THREE, sparsity=-0.1), errors.InvalidAmountError, "-0.1"),
    "NaN sparsity": (lambda: methods.select(THREE, sparsity=math.nan), errors.InvalidAmountError, "nan"),
    "a bool": (lambda: methods.select(THREE, count=True), errors.InvalidAmountError, "True"),
    "a fraction as a count": (lambda: methods.select(THREE, count=0.5), errors.InvalidAmountError, "0.5"),
    "more than there is": (lambda: methods.select(THREE, count=9), errors.InvalidAmountError, "at most 8.*\n.*9"),
    "scope": (lambda: methods.select(THREE, count=1, scope="local"), errors.InvalidScopeError, "'local'"),
    "min_per_layer": (lambda: methods.select(THREE, count=1, min_per_layer=-1), errors.InvalidFloorError, "-1"),
    "floor too high": (
        lambda: methods.select(THREE, count=6, min_per_layer=1),
        errors.InvalidFloorError,
        "1 for each of 3 layers, 2 entries kept in all",
    ),
    "NaN score": (
        lambda: methods.select(scores_of([[1.0, math.nan]]), count=1),
        errors.NonFiniteScoresError,
        r"t0 of shape \(1, 2\): 1 NaN",
    ),
    "infinite score": (lambda: methods.select(scores_of([[1.0, INF]]), count=1), errors.NonFiniteScoresError, "1 NaN"),
    "3 of 2": (lambda: methods.NofM(3, 2), errors.InvalidPatternError, r"NofM\(n=3, m=2"),
    "0 of 2": (lambda: methods.NofM(0, 2), errors.InvalidPatternError, r"NofM\(n=0, m=2"),
    "along": (lambda: methods.NofM(1, 2, "output"), errors.InvalidPatternError, "'output'"),
    "no pattern": (lambda: methods.select(THREE, pattern="2:4"), errors.InvalidPatternError, "'2:4'"),
    "pattern and sparsity": (
        lambda: methods.select(THREE, sparsity=0.5, pattern=methods.NofM(1, 2)),
        errors.InvalidPatternError,
        "'sparsity': 0.5",
    ),
    "pattern that does not fit": (
        lambda: methods.select(THREE, pattern=methods.NofM(1, 2)),
        errors.PatternMismatchError,
        r"not so in 't1 of shape \(2, 1\)'\n",
    ),
    "density": (lambda: methods.erk([(2, 2)], 2.0), errors.InvalidAmountError, "2.0"),
    "no shapes": (lambda: methods.erk([], 0.5), errors.NothingToPruneError, "empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_user_can_get_wrong(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, errors.InterspaceError)
    assert "What to do: " in str(caught.value)


def test_what_does_not_fit_a_pattern_is_left_out_as_the_error_says() -> None:
    pattern = methods.NofM(1, 2)
    fitting = {where: s for where, s in THREE.items() if pattern.fits(s.shape)}
    assert kept(methods.select(fitting, pattern=pattern)) == [[1, 0, 1, 0], [0, 1]]


# Applying


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_masks_are_applied_again_and_again_in_either_space(space: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(96, 4))
    if space == "interspace":
        interspace(model, basis="dct")
    host.random_unstructured(model[2], "weight", amount=8)
    size = sum(layer.parameter.numel() for layer in prunable_tensors(model))
    before = None
    for sparsity in (0.3, 0.6, 0.9):
        chosen = methods.select(methods.magnitude(model), sparsity=sparsity, min_per_layer=1)
        assert methods.apply_masks(model, chosen) is model
        found = masks(model)
        assert sum(int((~mask).sum()) for mask in found.values()) == round(sparsity * size)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), chosen.values(), strict=True))
        if before is not None:
            assert not any((found[name] & ~before[name]).any() for name in found)
        before = found
    assert not host.is_pruned(model)
    outputs = model(torch.randn(1, 3, 6, 6))
    methods.apply_masks(model, chosen)  # by the targets of before, where layers had no mask
    assert list(masks(model)) == ["0", "2", "4"] and outputs.isfinite().all()


def test_targets_and_masks_that_the_model_does_not_have_are_refused_and_nothing_changes() -> None:
    model = interspace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
    set_masks(model, {"2": torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])})
    before = masks(model)
    good = {prunable(model)[0]: torch.zeros(4, 3, 3, 3, dtype=torch.bool)}
    foreign = {(nn.Linear(4, 2), "weight"): torch.ones(2, 4)}
    with pytest.raises(errors.UnknownTargetError, match="'weight' of a Linear that is no target of this model"):
        methods.apply_masks(model, {**good, **foreign})
    with pytest.raises(errors.UnknownTargetError, match="'bias' of a ParametrizedLinear"):
        methods.apply_masks(model, {**good, (model[2], "bias"): torch.ones(2)})
    with pytest.raises(errors.InvalidMaskError, match="layer '2'"):
        methods.apply_masks(model, {**good, (model[2], "weight"): torch.ones(4, 2)})
    assert list(masks(model)) == ["2"] and torch.equal(masks(model)["2"], before["2"])
