"""What each process of the distributed tests runs: a module of its own, so that a spawned process can import it."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from kinds import SHARINGS, Case
from torch import nn

from ip_plugin import interspace, masks, prunable
from ip_plugin.adapters import torch_prune
from ip_plugin.methods import SET, Gradual, RigL, grasp, movement, snip

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


def join(rank: int, folder: str) -> None:
    """Meet the other process by a file: a port that was free may be taken until both have started."""
    store, patience = f"file://{folder}/store", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)


def worker(rank: int, folder: str, model: nn.Module, x: torch.Tensor) -> None:
    torch.set_num_threads(1)
    join(rank, folder)
    output = model(x).detach()
    found = {
        "trained": trained(rank), "scores": scores(rank), "masks": sparsely_trained(rank), "output": output,
        "received": received(rank),
    }  # fmt: skip
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def trained(rank: int) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """Each process has half of a batch: states after training, and numbers of bases."""
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
    return results


def received(rank: int) -> torch.Tensor:
    """What a model computes whose masks are set in the first process alone, after it has been wrapped."""
    model, x, _ = case_of("conv2d", "layer", masked=False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(x)
    if rank == 0:
        torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=0.5)
    return wrapped(x).detach()


def scores(rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores that the processes compute together from one batch each, and those of both batches without the other."""
    torch.manual_seed(0)
    model = interspace(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double(), basis="dct"
    )
    data = [(torch.randn(5, 3, 4, 4).double(), torch.arange(5) % 3) for _ in range(2)]
    wrapped = nn.parallel.DistributedDataParallel(model)
    results = []
    for batches, network in (([data[rank]], wrapped), (data, model)):
        found = [score(network, batches, F.cross_entropy) for score in (snip, grasp, movement)]
        results.append([each for by_target in found for each in by_target.values()])
    F.cross_entropy(wrapped(data[rank][0]), data[rank][1]).backward()
    wrapped(data[rank][0])
    return results[0], results[1]


SCHEDULES = ("set", "rigl", "gradual", "snip")


def sparsely_trained(rank: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Sparse training, where every process has data of its own: the masks after every update."""
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}
    for kind in SCHEDULES:
        torch.manual_seed(0)
        model, x = Case("conv2d", "orthonormal", "model").interspace()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(rank)
        torch.manual_seed(rank)  # nothing may depend on the state that the processes do not share

        def loss(x: torch.Tensor, model: nn.Module = wrapped) -> torch.Tensor:
            return F.cross_entropy(model(x), torch.arange(len(x)) % 3)

        schedule: Any = None
        if kind == "snip":
            schedule = Gradual(
                wrapped,
                sparsity=0.8,
                end_step=6,
                min_per_layer=1,
                score=lambda m: snip(
                    m, [(torch.randn(x.shape, generator=generator), torch.tensor([0, 1]))], F.cross_entropy
                ),
            )
        elif kind == "gradual":
            schedule = Gradual(wrapped, sparsity=0.7, end_step=6, min_per_layer=1)
        else:
            schedule = {"set": SET, "rigl": RigL}[kind](
                wrapped, optimizer, sparsity=0.6, end_step=20, update_every=1, drop_fraction=0.5
            )
        seen[kind] = []
        for _ in range(6):
            batch = torch.randn(x.shape, generator=generator)
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            schedule.step(*([lambda batch=batch, loss=loss: loss(batch)] if kind == "rigl" else []))
            seen[kind].append(masks(model))  # before the next forward pass, which sends buffers round
    return seen
