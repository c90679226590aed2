"""How much faster, and in how much memory, whole sparse networks run than the fastest dense ones.

    python benchmarks/sparse_networks.py

ResNet-18 (CIFAR shape, batch 1 and 16) and ResNet-50 (224x224, batch 1), 95 % sparsity by magnitude with one threshold
for all layers, in both spaces. Dense is the fastest of torch on NCHW, on channels_last, and inductor with frozen weights;
all take turns in one run. Peak memory is that of a process which has the network prepared and runs it, above one that
has imported the packages, against the same of the dense network.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from harness import side_by_side
from torch import Tensor, nn

import ip_plugin
from ip_plugin.methods import apply_masks, magnitude, select

#: network, batch: the least that IP must reach.
CASES = {("resnet18", 1): 2.5, ("resnet18", 16): 2.5, ("resnet50", 1): 1.7}


def network(name: str, space: str, sparsity: float) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A pruned network whose activations have a sensible scale, and what makes images for it."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(num_classes=10 if name == "resnet18" else 1000)
    size = 32 if name == "resnet18" else 224
    if name == "resnet18":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    with torch.no_grad():  # statistics of BatchNorm
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    if space == "IP":
        ip_plugin.interspace(model, basis="orthonormal", sharing="model")
    if space != "dense":
        apply_masks(model, select(magnitude(model), sparsity=sparsity))
    return model.eval(), lambda batch: torch.randn(batch, 3, size, size)


def peak(name: str, space: str, sparsity: float, batch: int) -> float:
    """Peak memory in MiB of a process of its own."""
    command = [sys.executable, __file__, "--peak", name, space, str(sparsity), str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak(name: str, space: str, sparsity: float, batch: int) -> None:
    """Build in a child, hand over by a file, so that building does not count."""
    from ip_plugin.sparse import prepare

    model, images = network(name, space, sparsity)
    run = ip_plugin.bake(model).eval() if space == "dense" else prepare(model, images(batch))
    example = images(batch)
    del model
    with torch.no_grad():
        run(example)
        reset()
        before = resident()
        for _ in range(3):
            run(example)
    print(resident("VmHWM") if before else 0)


def reset() -> None:
    """Forget the peak."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident(which: str = "VmRSS") -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(which))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        name, space, sparsity, batch = arguments.peak
        _peak(name, space, float(sparsity), int(batch))
        return
    from ip_plugin.sparse import prepare

    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.sparsity:.0%} sparsity\n")
    for (name, batch), goal in CASES.items():
        model, images = network(name, "dense", 0)
        example = images(batch)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        last_example = example.to(memory_format=torch.channels_last)
        torch._inductor.config.freezing = True
        compiled = torch.compile(copy.deepcopy(model))
        variants: dict[str, Callable[[], object]] = {
            "channels_last": lambda last=last, example=last_example: last(example),
            "inductor": lambda compiled=compiled, example=example: compiled(example),
        }
        ways = [*variants]
        for space in ("SP", "IP"):
            sparse_model, _ = network(name, space, arguments.sparsity)
            began = time.perf_counter()
            run = prepare(sparse_model, example)
            print(f"{name}, batch {batch}, {space}: prepared in {time.perf_counter() - began:.1f} s")
            variants[space] = lambda run=run, example=example: run(example)
        with torch.no_grad():
            ratios = side_by_side(lambda: model(example), variants, rounds=arguments.rounds)
        best = min(1.0, *(ratios[way].ratio for way in ways))
        line = ", ".join(f"{space} {best / ratios[space].ratio:.2f}" for space in ("SP", "IP"))
        print(f"{name}, batch {batch}: times faster than the fastest dense network: {line} (IP: at least {goal})")
        print("  to plain torch: " + "; ".join(f"{way} {ratio}" for way, ratio in ratios.items()), flush=True)
    print()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
