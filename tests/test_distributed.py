"""DistributedDataParallel with two gloo processes."""

from __future__ import annotations

import copy
import datetime
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from kinds import SHARINGS, Case
from torch import nn

from ip_plugin import bake, interspace, masks, prunable, set_masks
from ip_plugin.adapters import torch_prune
from ip_plugin.errors import WrappedModelError

KINDS_TRAINED = ("conv1d", "conv2d", "conv3d", "transposed2d", "depthwise")


def steps(model: nn.Module, x: torch.Tensor, target: torch.Tensor, parameters: Any) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def case_of(kind: str, sharing: str, masked: bool) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Case(kind, "orthonormal", sharing).interspace()
    if masked:
        torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.5)
    return model, torch.cat([x, x.flip(0) * 0.5]), torch.tensor([0, 1, 2, 0])


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    results = {}
    for kind in KINDS_TRAINED:
        for sharing in SHARINGS:
            for masked in (False, True):
                model, x, target = case_of(kind, sharing, masked)
                wrapped = nn.parallel.DistributedDataParallel(model)
                mine = slice(2 * rank, 2 * rank + 2)
                steps(wrapped, x[mine], target[mine], wrapped.parameters())
                shared = len([n for n, _ in model.named_parameters() if n.endswith("basis")])
                results[f"{kind}-{sharing}-{masked}"] = (model.state_dict(), shared)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_the_model_that_one_process_trains(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
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
        with pytest.raises(WrappedModelError, match="call interspace.model. first, then DistributedDataParallel"):
            interspace(wrapped)
        wrapped = nn.parallel.DistributedDataParallel(interspace(model))
        set_masks(wrapped, {"module.0": torch.rand(3, 3, 3, 3) < 0.5})
        assert list(masks(wrapped)) == ["module.0"]
        assert type(bake(wrapped.module)[0]) is nn.Conv2d
    finally:
        dist.destroy_process_group()
