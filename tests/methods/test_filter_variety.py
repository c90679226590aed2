"""Filter variety: layers whose right answer is known, and the slow way to the same order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ip_plugin import interspace, report, set_masks
from ip_plugin.errors import AmountError, ScoreError
from ip_plugin.methods.filter_variety import measure, removal_order, similarities, varied


def slow_order(scores: Tensor, filters: Tensor) -> list[int]:
    """The rule as it reads: the two most similar of those that are left, of these the one of lower score."""
    vectors = filters.flatten(1).double()
    left = list(range(len(scores)))
    order = []
    while len(left) > 1:
        pairs = itertools.combinations(left, 2)
        best = max(pairs, key=lambda pair: float(torch.cosine_similarity(*vectors[list(pair)], dim=0)))
        goes = min(best, key=lambda index: float(scores[index]))
        order.append(goes)
        left.remove(goes)
    return [*order, *left]


def test_of_three_copies_the_weakest_go_and_a_rare_small_filter_stays() -> None:
    rare = torch.tensor([0.0, 0.0, 0.0, 0.1])
    filters = torch.stack([torch.tensor([1.0, 2.0, 0.0, 0.0]) * scale for scale in (3, 1, 2)] + [rare])
    scores = filters.norm(dim=1)
    assert removal_order(scores, filters).tolist()[:2] == [1, 2]
    assert removal_order(scores, filters, strength=0).tolist() == [3, 1, 2, 0]
    # The kernels of the strongest copy and the rare one are orthogonal: the weaker goes.
    assert removal_order(scores, filters).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_orthogonal_filters_leave_it_to_the_criterion(strength: float) -> None:
    filters = torch.eye(6) * torch.tensor([5.0, 3.0, 6.0, 1.0, 2.0, 4.0])[:, None]
    assert removal_order(filters.norm(dim=1), filters, strength).tolist() == [3, 4, 1, 5, 0, 2]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_the_rule_as_it_reads(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(count, 3, 2, 2, generator=generator, dtype=torch.float64)
    scores = torch.rand(count, generator=generator, dtype=torch.float64)
    assert removal_order(scores, filters).tolist() == slow_order(scores, filters)


def test_opposite_filters_are_not_redundant() -> None:
    filters = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.5]])
    assert removal_order(torch.tensor([1.0, 2.0, 3.0]), filters)[0] == 0


def test_strength_lies_between_both() -> None:
    # Two alike with high scores, one alone with the lowest; alike: 1 - similarity = 0.
    filters = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scores = torch.tensor([2.0, 3.0, 1.0])
    # Costs: filter 0 (1 - s) * 0.5, filter 2 s * 1: equal at s = 1/3.
    assert removal_order(scores, filters, strength=0.3)[0] == 2
    assert removal_order(scores, filters, strength=0.36)[0] == 0


def test_empty_filters_go_first() -> None:
    filters = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0]])
    assert removal_order(torch.tensor([1.0, 2.0, 9.0]), filters).tolist() == [2, 0, 1]
    assert removal_order(torch.tensor([1.0, 2.0, 9.0]), filters, strength=0).tolist() == [0, 1, 2]


def test_equal_scores_have_equal_ranks() -> None:
    filters = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert removal_order(torch.ones(3), filters, strength=0.1)[0] == 1


def test_scores_are_dealt_out_anew() -> None:
    filters = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    scores = torch.tensor([4.0, 3.0, 1.0, 2.0])
    # The two pairs are equally alike; of them the lower score goes: 2, then 1, then of 0 and 3 the lower, 3.
    assert removal_order(scores, filters).tolist() == [2, 1, 3, 0]
    assert varied(scores, filters).tolist() == [4.0, 2.0, 1.0, 3.0]


def test_similarities_by_hand() -> None:
    found = similarities(torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[1, 0.96, 0], [0.96, 1, 0], [0, 0, 0]]))


def test_one_filter() -> None:
    assert removal_order(torch.ones(1), torch.ones(1, 3)).tolist() == [0]


class Work(TorchDispatchMode):
    """Counts the entries that operations return, or that they look at to find the largest and the smallest."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        looked_at = args if func.overloadpacket in (torch.ops.aten.max, torch.ops.aten.min) else result
        self.entries += sum(each.numel() for each in tree_leaves(looked_at) if isinstance(each, Tensor))
        return result


def test_work_grows_with_the_square_of_the_number_of_filters() -> None:
    entries = []
    for count in (256, 512, 1024):
        filters = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
        with Work() as work:
            order = removal_order(filters.norm(dim=1), filters)
        assert sorted(order.tolist()) == list(range(count))
        entries.append(work.entries)
    assert 3 < entries[1] / entries[0] < 5 and 3 < entries[2] / entries[1] < 5


@pytest.mark.parametrize(
    ("scores", "filters", "strength", "text"),
    [
        (torch.ones(2), torch.ones(3, 2), 1.0, r"scores \(2,\), filters \(3, 2\)"),
        (torch.ones(2, 1), torch.ones(2, 2), 1.0, "one score for each filter"),
        (torch.ones(0), torch.ones(0, 2), 1.0, "one score for each filter"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2, 2), 1.0, "NaN"),
        (torch.ones(2), torch.full((2, 2), torch.inf), 1.0, "not finite"),
        (torch.ones(2), torch.ones(2, 2), 1.5, "1.5"),
        (torch.ones(2), torch.ones(2, 2), float("nan"), "nan"),
    ],
)
def test_bad_input_is_refused(scores: Tensor, filters: Tensor, strength: float, text: str) -> None:
    with pytest.raises((ScoreError, AmountError), match=text):
        removal_order(scores, filters, strength)


def test_the_measure_by_hand() -> None:
    found = measure(torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0], [-1.0, 0.0]]))
    assert found is not None
    # Similarities 0.96, -0.6 and -0.8.
    assert found.mean_similarity == pytest.approx((0.96 - 0.6 - 0.8) / 3, abs=1e-5)
    assert found.largest_similarity == pytest.approx(0.96, abs=1e-5)
    vectors = torch.tensor([[0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]], dtype=torch.float64)
    shares = torch.linalg.svdvals(vectors)
    shares = shares / shares.sum()
    assert found.effective_rank == pytest.approx(float((-shares * shares.log()).sum().exp()), abs=1e-5)


def test_copies_have_rank_one_and_one_filter_no_variety() -> None:
    assert measure(torch.ones(5, 3)) == (1.0, 1.0, 1.0)
    assert measure(torch.ones(1, 3)) is measure(torch.zeros(4, 3)) is measure(torch.zeros(0, 3)) is None


def test_the_report_measures_what_is_computed_with() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(4, 1))
    plain = report(model, variety=True)
    conv, transposed, linear = plain.rows
    assert (conv.mean_similarity, conv.largest_similarity, conv.effective_rank) == measure(model[0].weight)
    # Output 4 of the transposed convolution is the second of its second group.
    weight = model[1].weight
    filters = torch.stack([weight[4 * (o // 3) : 4 * (o // 3) + 4, o % 3] for o in range(6)])
    assert (transposed.mean_similarity, transposed.largest_similarity, transposed.effective_rank) == measure(filters)
    assert linear.effective_rank is None and plain.prunable.effective_rank is None
    assert "eff. rank" in str(plain) and "eff. rank" not in str(report(model))
    assert report(model).rows[0].mean_similarity is None
    inter = report(interspace(model, basis="orthonormal"), variety=True).rows[0]
    assert inter.effective_rank == pytest.approx(conv.effective_rank, abs=1e-3)
    mask = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    mask[4:] = False
    assert report(set_masks(model, {"0": mask}), variety=True).rows[0].effective_rank < 4.001
