"""Convolutions that are summed up by the columns of their kernels, and images whose rows are aligned for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

pytest.importorskip("numba")

from ip_plugin import interspace
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import prepare
from ip_plugin.sparse.autotune import by_rule
from ip_plugin.sparse.graph import baked, trace
from ip_plugin.sparse.lowering import lower
from ip_plugin.sparse.steps import SparseConvolution


def pruned(model: nn.Module, sparsity: float) -> nn.Module:
    return apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer")).eval()


def block(inputs: int, outputs: int) -> BasicBlock:
    """A block that halves height and width where it widens."""
    if inputs == outputs:
        return BasicBlock(inputs, outputs)
    return BasicBlock(inputs, outputs, 2, nn.Conv2d(inputs, outputs, 1, 2))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (56, 14), (9, 30)])
def test_networks_with_aligned_rows(size: tuple[int, int], images: int, deterministic: bool) -> None:
    model = pruned(nn.Sequential(block(32, 32), block(32, 64), block(64, 64), block(64, 96)), 0.93)
    values = torch.randn(images, 32, *size)
    network = prepare(model, values, deterministic=deterministic, dense="torch")
    with torch.no_grad():
        torch.testing.assert_close(network(values), model(values), rtol=1e-4, atol=1e-5)
    if deterministic and size == (28, 28):
        how = {run.layer: run.how for run in network.runs(values)}  # type: ignore[operator]
        assert {name for name, way in how.items() if way == "columns"} == {n for n in how if "downsample" not in n}


class SharedPhases(nn.Module):
    """The smaller kernel reads the rows and columns that were split off for the larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(32, 24, 5, 2, 2), nn.Conv2d(32, 24, 3, 2, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.large(images), self.small(images)


@pytest.mark.parametrize("size", [27, 56])
def test_kernels_that_share_phases_are_summed_up_by_columns(size: int) -> None:
    model, images = pruned(SharedPhases(), 0.93), torch.randn(2, 32, size, size)
    network = prepare(model, images, deterministic=True, dense="torch")
    assert {run.how for run in network.runs(images)} == {"columns"}  # type: ignore[operator]
    torch.testing.assert_close(network(images), tuple(value.detach() for value in model(images)), rtol=1e-4, atol=1e-5)


def test_the_rule_sums_up_by_columns_only_where_little_is_kept() -> None:
    images = torch.randn(1, 64, 14, 14)
    for sparsity, how in ((0.85, "fused"), (0.95, "columns")):
        model = pruned(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), sparsity)
        (run,) = prepare(model, images, deterministic=True, dense="torch").runs(images)  # type: ignore[operator]
        assert run.how == how


def pitches(model: nn.Module, size: int) -> set[int]:
    """Distances between the rows of images that convolutions write."""
    values = torch.randn(1, 24, size, size)
    steps = lower(trace(*baked(model), (values,)).module, (values,), by_rule).steps
    return {step.addressing.target.pitch for step in steps if isinstance(step, SparseConvolution)}


@pytest.mark.parametrize(
    ("size", "pitch"),
    [(13, 16), (14, 16), (15, 16), (27, 32), (28, 32), (56, 64), (112, 128), (12, 13), (20, 21), (130, 131)],
)
def test_rows_are_aligned_where_they_become_little_longer(size: int, pitch: int) -> None:
    assert pitches(pruned(nn.Sequential(nn.Conv2d(24, 24, 3, padding=1)), 0.9), size) == {pitch}


def test_rows_are_aligned_only_for_what_is_summed_up_by_columns() -> None:
    three = nn.Conv2d(24, 24, 3, padding=1)
    assert pitches(pruned(nn.Sequential(three), 0.98), 14) == {15}  # too few non-zeros
    many_others = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 500, 1), nn.Conv2d(500, 24, 1))
    assert pitches(pruned(many_others, 0.9), 14) == {15}
    depthwise = nn.Sequential(nn.Conv2d(24, 24, 5, padding=2, groups=24))
    assert pitches(pruned(depthwise, 0.55), 13) == {15}
    converted = interspace(nn.Sequential(nn.Conv2d(24, 24, 3, padding=1)), basis="orthonormal", sharing="layer")
    assert pitches(pruned(converted, 0.9), 14) == {15}
