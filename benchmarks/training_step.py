"""What a training step costs in the interspace: ResNet-18, 32x32 images, against the same step of the plain network.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --constraints

A step is zero_grad, forward, backward and SGD with momentum. "masked" is at 90 % sparsity, against the plain network
with masks of the same density.

Composed weights come and go at every step. glibc's malloc gives memory that is freed back to the system and fetches it
anew, page by page, at a cost that depends on what else lies in the heap; so everything is measured with an allocator
that keeps what it has (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) and with glibc as it is, there also with each
network in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from harness import UNSTEADY, side_by_side
from torch import nn

import ip_plugin
from ip_plugin.basis.bases import CONSTRAINTS

#: (stem, batch): the most that the ratio of an unmasked step may be.
CASES = {("imagenet", 32): 1.45, ("imagenet", 128): 1.18, ("cifar", 32): 1.10}
KEEPING = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


def network(stem: str, variant: str) -> nn.Module:
    """ResNet-18 of torchvision; with a CIFAR stem its first convolution is 3x3 and there is no pooling."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if "interspace" in variant:
        constraint, _, _ = variant.rpartition(" interspace")
        ip_plugin.interspace(model, constraint=constraint if constraint in CONSTRAINTS else "unit")
    if "masked" in variant:
        targets = [
            (name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        ip_plugin.set_masks(model, {name: torch.rand(module.weight.shape) < 0.1 for name, module in targets})
    return model


def stepper(stem: str, batch: int, variant: str) -> Callable[[], None]:
    """A training step of one variant."""
    model = network(stem, variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def alone(stem: str, batch: int, variant: str, environment: dict[str, str]) -> float:
    """Median time of a step in milliseconds, in a process of its own."""
    command = [sys.executable, __file__, "--alone", stem, str(batch), variant]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return float(run.stdout)


def in_processes(stem: str, batch: int, environment: dict[str, str], times: int = 4) -> tuple[float, float]:
    """(ratio, drift of the plain network) of processes that run in turn."""
    plain, inter = [], []
    for _ in range(times):
        plain.append(alone(stem, batch, "plain", environment))
        inter.append(alone(stem, batch, "interspace", environment))
    return statistics.median(inter) / statistics.median(plain), max(plain) / min(plain) - 1


def in_turn(allocator: str) -> None:
    """Print the ratios of networks that take turns in this process."""
    for (stem, batch), most in CASES.items():
        for name, baseline in (("interspace", "plain"), ("masked interspace", "masked")):
            steps = {name: stepper(stem, batch, name)}
            found = side_by_side(stepper(stem, batch, baseline), steps)[name]
            limit = f", at most {most}" if baseline == "plain" else ""
            print(f"  {allocator}: {stem} stem, batch {batch:3}: {name} / {baseline} {found}{limit}", flush=True)


def of_constraints() -> None:
    """Print what constraints cost, in this process: ratios to the interspace without one."""
    for stem, batch in CASES:
        variants = {name: stepper(stem, batch, f"{name} interspace") for name in ("unit", "orthonormal")}
        for name, found in side_by_side(stepper(stem, batch, "none interspace"), variants, rounds=60).items():
            print(
                f"  {stem} stem, batch {batch:3}: {name} / none {found.ratio:.3f}, drift {found.drift:.0%}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--constraints", action="store_true", help="measure what constraints cost, and nothing else")
    parser.add_argument("--in-turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.constraints:
        of_constraints()
        return
    if arguments.in_turn:
        in_turn(arguments.in_turn)
        return
    if arguments.alone:
        stem, batch, variant = arguments.alone
        step, found = stepper(stem, int(batch), variant), []
        for _ in range(25):
            started = time.perf_counter()
            step()
            found.append(time.perf_counter() - started)
        print(1e3 * statistics.median(found[5:]))
        return
    print(
        f"torch {torch.__version__}, {arguments.threads} threads; ratios to the plain step\n\nIn one process, in turn:"
    )
    for allocator, environment in (("keeping", KEEPING), ("glibc", {})):
        command = [sys.executable, __file__, "--threads", str(arguments.threads), "--in-turn", allocator]
        subprocess.run(command, check=True, env={**os.environ, **environment})
    print("\nEach in a process of its own, in turn:")
    for stem, batch in CASES:
        ratio, drift = in_processes(stem, batch, {})
        unsteady = " (baseline unsteady: throw away)" if drift > UNSTEADY else ""
        print(f"  glibc: {stem} stem, batch {batch:3}: interspace / plain {ratio:.2f}, drift {drift:.0%}{unsteady}")


if __name__ == "__main__":
    main()
