"""Averages of weights that were made before the model was pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import KINDS, every_kind
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ip_plugin import interspace, masks, prunable
from ip_plugin.adapters import torch_prune as prune
from ip_plugin.core.mask_tensor import MaskTensor
from ip_plugin.methods import RigL, magnitude
from ip_plugin.methods import prune as prune_by_score

pytestmark = pytest.mark.contract
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 5))
    return interspace(nn.Sequential(*layers))


def timm_average(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        return getattr(pytest.importorskip("timm").utils, name)(model, decay=0.9, **options)

    return make


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": AveragedModel,
    "buffers": lambda model: AveragedModel(model, use_buffers=True),
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "function": lambda model: AveragedModel(
        model, avg_fn=lambda mean, value, _: 0.9 * mean + 0.1 * value, use_buffers=True
    ),
    "timm": timm_average("ModelEma"),
    "timm V2": timm_average("ModelEmaV2"),
    "timm V3": timm_average("ModelEmaV3", foreach=False),
    "timm V3 foreach": timm_average("ModelEmaV3", foreach=True),
}


def update(average: Any, model: nn.Module) -> nn.Module:
    """Put the model's state into the average; returns the averaged model."""
    (average.update_parameters if isinstance(average, AveragedModel) else average.update)(model)
    averaged: nn.Module = average.module if hasattr(average, "module") else average.ema
    return averaged


def same_masks(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(mask, masks(second)[name]) for name, mask in masks(first).items())


@pytest.mark.parametrize("name", AVERAGES)
def test_the_masks_of_an_average_are_those_of_the_model_also_where_entries_grow_again(name: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = AVERAGES[name](model)
    averages_buffers = name != "parameters"
    target = torch.arange(4)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(X), target)

    def step() -> nn.Module:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return update(average, model)

    step()
    schedule = RigL(model, optimizer, sparsity=0.5, end_step=100, update_every=1, drop_fraction=0.5)
    before = masks(model)
    averaged = step()
    regrown = 0
    for _ in range(5):
        last = masks(model)
        schedule.step(loss)
        regrown += sum(int((mask & ~last[key]).sum()) for key, mask in masks(model).items())
        averaged = step()
        if averages_buffers:
            assert same_masks(model, averaged)
            assert masks(averaged).keys() == masks(model).keys()
    assert regrown > 50 and not all(torch.equal(mask, before[key]) for key, mask in masks(model).items())
    assert bool(averaged(X).isfinite().all())
    assert [buffer.dtype for buffer in averaged.buffers()] == [buffer.dtype for buffer in model.buffers()]


def layout(model: nn.Module) -> list[Any]:
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    return [parameters, [name for name, _ in model.named_buffers()], list(model.state_dict())]


@every_kind
def test_pruning_a_converted_model_changes_neither_names_nor_order(kind: str) -> None:
    plain, _ = KINDS[kind].ready()
    for prunes in (
        lambda model: prune.global_unstructured(prunable(model), prune.L1Unstructured, amount=0.5),
        lambda model: prune_by_score(model, magnitude, sparsity=0.5),
    ):
        model = interspace(copy.deepcopy(plain))
        before = layout(model)
        prunes(model)
        assert layout(model) == before and len(masks(model)) == 3


def test_masks_take_a_byte_an_entry_and_stay_bool() -> None:
    model = network()
    prune_by_score(model, magnitude, sparsity=0.5)
    for cast in (lambda m: m, nn.Module.half, nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)):
        buffers = [b for name, b in cast(copy.deepcopy(model)).named_buffers() if name.endswith("mask")]
        assert len(buffers) == 3
        assert all(b.dtype is torch.bool and b.element_size() == 1 for b in buffers)


def test_operations_on_a_mask_give_ordinary_tensors() -> None:
    mask = torch.tensor([True, False, True]).as_subclass(MaskTensor)  # type: ignore[no-untyped-call]
    for result in (mask & mask, ~mask, mask.clone(), mask.sum(), mask.float() * 0.5, mask - mask, mask[:2]):
        assert type(result) is Tensor
    assert (mask - torch.tensor([True, True, False])).tolist() == [0.0, -1.0, 1.0]
