"""Training that is stopped and resumed in another process: what each process runs."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin import interspace, load, param_groups, prunable, save
from ip_plugin.adapters import torch_prune

WORKERS = ("spatial", "interspace", "host")


def small() -> nn.Sequential:
    """A network with all kinds of state, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip


def pruned(space: str) -> nn.Sequential:
    model = small()
    if space == "interspace":
        interspace(model, basis="orthonormal", sharing="model")
    host_or_ours = host if space == "host" else torch_prune
    host_or_ours.global_unstructured(prunable(model), host_or_ours.L1Unstructured, amount=0.6)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """SGD; momentum and weight decay change pruned values, too."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, 9, 9, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        optimizer.step()


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Digests of all tensors of the model and the optimizer, whatever their names."""
    tensors = [t for n, t in model.state_dict().items() if not n.endswith(("mask", "_extra_state"))]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [hashlib.sha256(bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist())).hexdigest() for t in tensors]


def run_part(space: str, part: str, folder: Path) -> None:
    """All eight steps ("whole"), the first four, or the last four with a model from the file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = small() if part == "second" else pruned(space)
    if part == "second":
        load(model, folder / f"{space}.safetensors")
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=0.05)
    if part == "second":
        optimizer.load_state_dict(torch.load(folder / f"{space}.pt", weights_only=True))
    train(model, optimizer, range(4, 8) if part == "second" else range(4 if part == "first" else 8))
    (folder / f"{space}-{part}.json").write_text(json.dumps(sorted(digests(model, optimizer))))
    if part == "first":
        save(model, folder / f"{space}.safetensors", resumable=True)
        torch.save(optimizer.state_dict(), folder / f"{space}.pt")
    torch.set_num_threads(threads)


if __name__ == "__main__":
    for each in WORKERS:
        run_part(each, "second", Path(sys.argv[1]))
