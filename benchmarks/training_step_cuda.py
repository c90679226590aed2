"""What a training step costs in the interspace on a GPU, against the same step of the plain network.

    python benchmarks/training_step_cuda.py

A step is zero_grad, forward, backward and SGD with momentum, as `training_step.py` has it for CPUs. Steps of the
variants take turns; times are of CUDA events over six steps. "no masks" is the interspace without the masks of ones
that a converted model has from the start: what they cost. Exit status 1 if the plain network's time moved by over 10 %.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from harness import UNSTEADY
from torch import nn

import ip_plugin
from ip_plugin.core.tensor_ref import parametrized_tensors

#: (network, pixels, batch, bf16 autocast with channels_last, compiled)
CASES = [
    ("resnet18", 32, 128, False, False), ("resnet18", 32, 512, True, False), ("resnet50", 224, 64, False, False),
    ("resnet50", 224, 128, True, False), ("resnet50", 224, 128, True, True),
]  # fmt: skip
VARIANTS = ("plain", "interspace", "no masks", "one shared basis", "masked plain", "masked interspace")


def network(name: str, pixels: int, variant: str) -> nn.Module:
    """A network of torchvision; for small images its stem is 3x3 and there is no pooling."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    if pixels < 64:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    if "plain" not in variant:
        ip_plugin.interspace(model, sharing="model" if "shared" in variant else "layer")
    if "masked" in variant:
        shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        ip_plugin.set_masks(model, {name: torch.rand(shape) < 0.1 for name, shape in shapes.items()})
    if variant == "no masks":
        for ref in parametrized_tensors(model):
            assert ref.parametrization is not None
            ref.parametrization.is_applied = False
    return model.cuda()


def stepper(name: str, pixels: int, batch: int, mixed: bool, compiled: bool, variant: str) -> Callable[[], None]:
    """A training step of one variant."""
    model = network(name, pixels, variant)
    images, labels = torch.randn(batch, 3, pixels, pixels, device="cuda"), torch.randint(0, 10, (batch,), device="cuda")
    if mixed:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()

    return step


def times(steps: dict[str, Callable[[], None]], rounds: int = 14, at_once: int = 6) -> dict[str, list[float]]:
    """Milliseconds of a step, for each variant and round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in sorted(steps.items(), reverse=bool(number % 2)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(at_once):
                step()
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                found[name].append(start.elapsed_time(end) / at_once)
    return found


def main() -> None:
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; ratios of median times of a step")
    unsteady = False
    for name, pixels, batch, mixed, compiled in CASES:
        variants = [variant for variant in VARIANTS if not compiled or variant != "no masks"]
        found = times({variant: stepper(name, pixels, batch, mixed, compiled, variant) for variant in variants})
        medians = {variant: statistics.median(values) for variant, values in found.items()}
        plain = found["plain"]
        first, second = statistics.median(plain[: len(plain) // 2]), statistics.median(plain[len(plain) // 2 :])
        drift = abs(second / first - 1)
        unsteady |= drift > UNSTEADY
        ratios = {
            "interspace / plain": medians["interspace"] / medians["plain"],
            "one shared basis / plain": medians["one shared basis"] / medians["plain"],
            "masked interspace / masked plain": medians["masked interspace"] / medians["masked plain"],
        }
        if not compiled:
            ratios["masks of ones / none"] = medians["interspace"] / medians["no masks"]
        how = f"{'bf16, channels_last' if mixed else 'float32'}{', compiled' if compiled else ''}"
        print(f"{name}, {pixels} pixels, batch {batch}, {how}: plain {medians['plain']:.1f} ms, drift {drift:.0%}")
        for what, ratio in ratios.items():
            print(f"  {what} {ratio:.3f}", flush=True)
        torch.cuda.empty_cache()
    sys.exit(int(unsteady))


if __name__ == "__main__":
    main()
