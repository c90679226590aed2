"""What pruning a ResNet-50 in fitted bases costs: time, and memory while it runs.

    python benchmarks/fitted_size.py

Limits: 60 s, and extra memory of at most three times the weights. With data there is no limit.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision
from conversion import memory

from ip_plugin.methods import prune_fitted

#: Images of 224x224 pixels, by name of the variant.
VARIANTS = {"no data": 0, "64 images": 64}


def measure(variant: str) -> None:
    """Prune one network, and print seconds and bytes."""
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    images = VARIANTS[variant]
    # What is loaded at the first call is not counted.
    prune_fitted(small, sparsity=0.5, batches=[(torch.randn(2, 3, 8, 8), None)] if images else None)
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    batches = [(torch.randn(8, 3, 224, 224), None) for _ in range(images // 8)] or None
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    started = time.perf_counter()
    prune_fitted(model, sparsity=0.8, batches=batches)
    seconds = time.perf_counter() - started
    extra = memory("VmHWM") - before
    print(
        f"{variant}: {seconds:.1f} s, extra memory {extra / 2**20:.0f} MiB, {extra / size:.2f} times the weights "
        f"({size / 2**20:.0f} MiB)"
    )


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    for variant in VARIANTS:
        subprocess.run([sys.executable, __file__, variant], check=True)


if __name__ == "__main__":
    main()
