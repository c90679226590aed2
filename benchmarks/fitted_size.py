"""What pruning a ResNet-50 in fitted bases costs without data: time, and memory while it runs.

    python benchmarks/fitted_size.py

Limits: 60 s, and extra memory of at most three times the weights.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
import torchvision
from conversion import memory

from ip_plugin.methods import prune_fitted


def main() -> None:
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    prune_fitted(torch.nn.Conv2d(3, 8, 3), sparsity=0.5)  # what is loaded at the first call is not counted
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    prune_fitted(model, sparsity=0.8)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    extra = memory("VmHWM") - before
    print(f"{seconds:.1f} s, {cpu:.1f} s of CPU time in all threads")
    print(f"extra memory {extra / 2**20:.0f} MiB: {extra / size:.2f} times the weights")


if __name__ == "__main__":
    main()
