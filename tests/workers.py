"""What each process of the distributed test runs: a module of its own, so that a spawned process can import it."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from kinds import SHARINGS, Case
from torch import nn

from ip_plugin import prunable
from ip_plugin.adapters import torch_prune

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
