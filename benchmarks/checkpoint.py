"""Compact checkpoints of a ResNet-50: bytes against what they cannot be below, time against torch.save and torch.load.

    python benchmarks/checkpoint.py sizes
    python benchmarks/checkpoint.py times

Limits: 1.10 times the bound at 80, 90, 95 and 99 %; 3 times as long at 90 %. The bound is what the non-zero values, the
entropy of their positions in each layer, and everything dense take. Weights are random, pruned by magnitude.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from harness import side_by_side
from torch import nn

import ip_plugin
from ip_plugin import interspace, prunable
from ip_plugin.adapters import torch_prune
from ip_plugin.core.tensor_ref import by_basis, prunable_tensors, tensors_of


def pruned(space: str, sparsity: float, scope: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50()
    if space == "interspace":
        interspace(model, basis="orthonormal")
    if scope == "global":
        torch_prune.global_unstructured(prunable(model), torch_prune.L1Unstructured, amount=sparsity)
    else:
        for where in prunable(model):
            torch_prune.l1_unstructured(*where, amount=sparsity)
    return model


def bound(model: nn.Module) -> float:
    """Bytes of non-zero values, the entropy of their positions, and everything dense."""
    total = 0.0
    sparse = set()
    for layer in prunable_tensors(model):
        assert layer.mask is not None
        kept, numel = int(layer.mask.sum()), layer.mask.numel()
        share = kept / numel
        entropy = 0.0 if share in (0, 1) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)
        total += kept * layer.parameter.element_size() + entropy * numel / 8
        sparse.add(id(layer.parameter))
    rest = [ref.parameter for ref in tensors_of(model) if id(ref.parameter) not in sparse]
    rest += by_basis(prunable_tensors(model))
    return total + sum(tensor.numel() * tensor.element_size() for tensor in rest)


def sizes(folder: Path) -> None:
    for sparsity in (0.8, 0.9, 0.95, 0.99):
        for scope in ("global", "layer"):
            for space in ("spatial", "interspace"):
                model = pruned(space, sparsity, scope)
                ip_plugin.save(model, folder / "model")
                size, least = os.path.getsize(folder / "model"), bound(model)
                print(f"{sparsity:.0%} {scope:6} {space:10}: {size:10,} bytes, {size / least:.3f} times the bound")
    torch.save(torchvision.models.resnet50().state_dict(), folder / "dense")
    print(f"torch.save of the dense network: {os.path.getsize(folder / 'dense'):,} bytes")


def times(folder: Path) -> None:
    dense = torchvision.models.resnet50()
    models = {space: pruned(space, 0.9, "global") for space in ("spatial", "interspace")}
    saves: dict[str, Callable[[], object]] = {}
    loads: dict[str, Callable[[], object]] = {}
    for space, model in models.items():
        for name, options in ((space, {}), (f"{space}, resumable", {"resumable": True})):
            path = folder / name
            saves[name] = lambda model=model, path=path, options=options: ip_plugin.save(model, path, **options)
            # A freshly built model each time, which is not timed.
            loads[name] = lambda path=path: partial(ip_plugin.load, torchvision.models.resnet50(), path)
    target = torchvision.models.resnet50()
    loads["load_state_dict(torch.load)"] = lambda: (
        lambda: target.load_state_dict(torch.load(folder / "dense", weights_only=True))
    )
    for name, ratio in side_by_side(lambda: torch.save(dense.state_dict(), folder / "dense"), saves, rounds=10).items():
        print(f"save {name}: {ratio}")
    baseline = lambda: lambda: torch.load(folder / "dense", weights_only=True)  # noqa: E731
    for name, ratio in side_by_side(baseline, loads, rounds=10, prepared=True).items():
        print(f"load {name}: {ratio}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        {"sizes": sizes, "times": times}[sys.argv[1]](Path(temporary))
