"""What `interspace` and `bake` cost on a ResNet-50: time, and memory while they run.

    python benchmarks/conversion.py

Limits: 0.5 s, and extra memory of at most the coefficients' own size.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

import ip_plugin

REPEATS = 5


def memory(kind: str) -> int:
    """Resident memory in bytes: "VmRSS" now, "VmHWM" its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{kind} is not in /proc/self/status; this needs Linux")


def measure(basis: str) -> None:
    """Convert one network, and print seconds and bytes."""
    torch.set_num_threads(2)
    model = torchvision.models.resnet50()
    converted = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)]
    size = sum(weight.numel() * weight.element_size() for weight in converted)
    ip_plugin.interspace(torch.nn.Conv2d(4, 4, 3), basis=basis)  # what is loaded at the first call is not counted
    times = []
    for _ in range(REPEATS):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        started = time.perf_counter()
        ip_plugin.interspace(model, basis=basis)
        times.append(time.perf_counter() - started)
        extra = memory("VmHWM") - before
        started = time.perf_counter()
        ip_plugin.bake(model)
        baked = time.perf_counter() - started
    print(
        f"{basis}: interspace {min(times):.3f} to {max(times):.3f} s, extra memory {extra / 2**20:.1f} MiB "
        f"(coefficients {size / 2**20:.1f} MiB), bake {baked:.3f} s"
    )


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    for basis in ("standard", "orthonormal", "dct"):
        subprocess.run([sys.executable, __file__, basis], check=True)


if __name__ == "__main__":
    main()
