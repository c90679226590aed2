"""What RigL costs in a training step, and SNIP beside a forward and backward pass: ResNet-18, 32x32 images.

    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=1000000000 python benchmarks/sparse_training_step.py

A step is zero_grad, forward, backward and SGD with momentum, at 90 % sparsity. Limits: a RigL step that does not update
1.03 of it, one that does 3 of it; SNIP on one batch 1.2 of a forward and backward pass of the dense network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from harness import side_by_side
from torch import Tensor, nn

from ip_plugin import interspace
from ip_plugin.methods import RigL, snip


def network(space: str) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    return interspace(model, basis="orthonormal") if space == "interspace" else model


class Stepper:
    """Training steps of one network, with RigL after each of them."""

    def __init__(self, space: str, images: Tensor, labels: Tensor, every: int) -> None:
        self.model, self.images, self.labels = network(space), images, labels
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
        self.rigl = RigL(self.model, self.optimizer, sparsity=0.9, end_step=10**9, update_every=every)

    def loss(self) -> Tensor:
        """Of the batch."""
        return F.cross_entropy(self.model(self.images), self.labels)

    def plain(self) -> None:
        """A step without RigL."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def with_rigl(self) -> None:
        """And one with it."""
        self.plain()
        self.rigl.step(self.loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, ResNet-18, 32x32, batch {arguments.batch}")
    images, labels = torch.randn(arguments.batch, 3, 32, 32), torch.randint(0, 10, (arguments.batch,))
    for space in ("spatial", "interspace"):
        waits, updates = (Stepper(space, images, labels, every) for every in (10**8, 1))
        found = side_by_side(
            waits.plain, {"RigL, no update": waits.with_rigl, "RigL, update": updates.with_rigl}
        )  # the second network is another one of the same density
        for name, ratio in found.items():
            print(f"  {space}: {name} / masked step {ratio}", flush=True)
        model = network(space)

        def passes(model: nn.Module = model) -> None:
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()

        def scores(model: nn.Module = model) -> None:
            snip(model, [(images, labels)], F.cross_entropy)

        measured: dict[str, Callable[[], None]] = {"SNIP": scores}
        print(f"  {space}: SNIP / forward and backward {side_by_side(passes, measured)['SNIP']}", flush=True)


if __name__ == "__main__":
    main()
