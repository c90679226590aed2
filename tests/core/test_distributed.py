"""DistributedDataParallel with two gloo processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from workers import KINDS_TRAINED, SCHEDULES, case_of, steps, worker

from ip_plugin import bake, interspace, load, masks, param_groups, report, save, set_masks
from ip_plugin.errors import ConversionError
from ip_plugin.methods import magnitude, prune

pytestmark = pytest.mark.contract


def given() -> tuple[nn.Module, torch.Tensor]:
    model, x, _ = case_of("conv2d", "model", masked=True)
    return model, x


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two processes, see `workers`."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, args=(str(folder), *given()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_a_pruned_model_is_handed_to_other_processes(found: list[dict[str, Any]]) -> None:
    model, x = given()
    assert all(torch.equal(each["output"], model(x)) for each in found)


def test_masks_that_another_process_sends_are_applied(found: list[dict[str, Any]]) -> None:
    model, x, _ = case_of("conv2d", "layer", masked=True)
    assert all(torch.equal(each["received"], model(x)) for each in found)


def test_two_processes_have_the_same_masks_after_every_update(found: list[dict[str, Any]]) -> None:
    first, second = (each["masks"] for each in found)
    assert list(first) == list(SCHEDULES)
    for kind, updates in first.items():
        assert len(updates) == 6
        for mine, theirs in zip(updates, second[kind], strict=True):
            assert mine.keys() == theirs.keys() == {"0", "2", "4"}
            assert all(torch.equal(mask, theirs[name]) for name, mask in mine.items()), kind
        assert any(not torch.equal(updates[0][name], updates[-1][name]) for name in updates[0]), kind


def test_processes_that_see_other_data_get_the_same_scores(found: list[dict[str, Any]]) -> None:
    (first, alone), (second, _) = (each["scores"] for each in found)
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first, alone)


def test_two_processes_train_the_model_that_one_process_trains(found: list[dict[str, Any]]) -> None:
    first, second = (each["trained"] for each in found)
    assert len(first) == len(KINDS_TRAINED) * 3 * 2
    for name, (state, bases) in first.items():
        kind, sharing, masked = name.split("-")
        model, x, target = case_of(kind, sharing, masked == "True")
        steps(model, x, target, model.parameters())
        assert bases == (2 if sharing == "layer" else 1)
        for key, tensor in model.state_dict().items():
            assert torch.equal(state[key], second[name][0][key]), (name, key)
            torch.testing.assert_close(state[key], tensor, msg=lambda m, where=(name, key): f"{where}: {m}")


def test_a_wrapped_model_is_refused_but_can_be_baked_copied_and_masked_inside(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        with pytest.raises(ConversionError, match="call interspace.model. first, then DistributedDataParallel"):
            interspace(wrapped)
        wrapped = nn.parallel.DistributedDataParallel(interspace(model))
        set_masks(wrapped, {"module.0": torch.rand(3, 3, 3, 3) < 0.5})
        assert list(masks(wrapped)) == ["module.0"]
        assert type(bake(wrapped.module)[0]) is nn.Conv2d
    finally:
        dist.destroy_process_group()


SHARDED = {
    "interspace": lambda model, file: interspace(model),
    "bake": lambda model, file: bake(model),
    "prune": lambda model, file: prune(model, magnitude, sparsity=0.5),
    "set_masks": lambda model, file: set_masks(model, {"0": torch.ones(3, 3, 3, 3)}),
    "save": lambda model, file: save(model, file),
    "load": lambda model, file: load(model, file),
}


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_a_sharded_model_trains_and_is_refused_elsewhere(space: str, tmp_path: Path) -> None:
    shard = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(shard, "fully_shard"):
        pytest.skip("torch 2.5 shards on GPUs alone")

    def small() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(27, 3))
        if space == "interspace":
            interspace(model, basis="dct", sharing="model")
        return prune(model, magnitude, sparsity=0.5)

    x, target = torch.randn(3, 3, 7, 7), torch.arange(3)
    save(small(), tmp_path / "saved")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model, expected = small(), small()
        shard.fully_shard(model, mesh=mesh)
        for name, call in SHARDED.items():
            with pytest.raises(ConversionError, match="load its full state dict"):
                call(model, tmp_path / name if name == "save" else tmp_path / "saved")
        steps(model, x, target, param_groups(model, weight_decay=0.01))
        steps(expected, x, target, param_groups(expected, weight_decay=0.01))
        with pytest.raises(ConversionError, match="load its full state dict"):  # gathered after a forward pass, too
            bake(model)
        full = {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in
                model.state_dict().items()}  # fmt: skip
        whole = small()
        whole.load_state_dict(full, strict=True)
        torch.testing.assert_close(whole(x), expected(x))
        assert report(whole).prunable.nonzeros == report(expected).prunable.nonzeros
        with pytest.raises(ConversionError, match="load its full state dict"):
            plain = nn.Sequential(nn.Conv2d(3, 3, 3))
            interspace(shard.fully_shard(plain, mesh=mesh) or plain)
    finally:
        dist.destroy_process_group()
