"""How much faster whole sparse networks run than the fastest dense ones of torch.

    python benchmarks/sparse_networks.py

ResNet-18 (CIFAR shape, batch 1 and 16) and ResNet-50 (224x224, batch 1), 95 % sparsity by magnitude, in both spaces:
with one threshold for all layers, which leaves early layers far denser than late ones, and with 95 % in every layer.
Dense is the fastest of torch on NCHW, on channels_last, and inductor with frozen weights; all take turns in one run,
each called once before it is timed. The network that is not pruned is prepared too: so much of the gain is not
pruning's. Weights are random; with ``--data`` those of the ResNet-18 are trained first, on 10,000 images of CIFAR-10,
and kept in the file that ``--weights`` names.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from harness import side_by_side
from torch import Tensor, nn
from trained import trained

import ip_plugin
from ip_plugin.compare import Study
from ip_plugin.compare.cell import images_of
from ip_plugin.compare.training import accuracy
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import prepare

#: network, batch: the least that IP must reach.
CASES = {("resnet18", 1): 2.5, ("resnet18", 16): 2.5, ("resnet50", 1): 1.7}

SCOPES: dict[Literal["global", "layer"], str] = {"global": "one threshold", "layer": "every layer alike"}


def network(
    name: str,
    space: str,
    sparsity: float,
    scope: Literal["global", "layer"] = "global",
    weights: dict[str, Any] | None = None,
) -> tuple[nn.Module, Callable[[int], Tensor]]:
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
    if weights is not None:
        model.load_state_dict(weights)
    if space == "IP":
        ip_plugin.interspace(model, basis="orthonormal", sharing="model")
    if space != "dense":
        apply_masks(model, select(magnitude(model), sparsity=sparsity, scope=scope, min_per_layer=1))
    return model.eval(), lambda batch: torch.randn(batch, 3, size, size)


def trained_weights(path: Path, data: str, epochs: int) -> dict[str, Any]:
    """Of a ResNet-18 that is trained now, if they are not there."""
    images = {"source": data, "train_images": 10_000, "augment": ("RandomHorizontalFlip",)}
    study = Study(data=images, training={"epochs": epochs, "batch_size": 128})
    loaded = images_of(study)
    model = trained(network("resnet18", "dense", 0)[0], path, study, loaded, seed=0)
    print(f"{accuracy(model, loaded.test):.1f} % of the test images right")
    return model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--data", help="CIFAR-10 as an .npz: train the ResNet-18 and measure it alone")
    parser.add_argument("--weights", type=Path, default=Path("resnet18.pt"), help="where trained weights are kept")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.sparsity:.0%} sparsity")
    print("times faster than torch's fastest dense network\n")
    weights = trained_weights(arguments.weights, arguments.data, arguments.epochs) if arguments.data else None
    for (name, batch), goal in CASES.items():
        if weights is not None and name != "resnet18":
            continue
        model, images = network(name, "dense", 0, weights=weights)
        example = images(batch)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        last_example = example.to(memory_format=torch.channels_last)
        torch._inductor.config.freezing = True
        compiled = torch.compile(copy.deepcopy(model))
        variants: dict[str, Callable[[], object]] = {
            "channels_last": partial(last, last_example),
            "inductor": partial(compiled, example),
        }
        ways = [*variants]
        cells = [(scope, space) for scope in SCOPES for space in ("SP", "IP")]
        for scope, space in cells:
            sparse_model, _ = network(name, space, arguments.sparsity, scope, weights)
            variants[f"{space}, {scope}"] = partial(prepare(sparse_model, example), example)
        variants["dense, prepared"] = partial(prepare(model, example), example)
        with torch.no_grad():
            ratios = side_by_side(partial(model, example), variants, rounds=arguments.rounds, untimed=1)
        best = min(1.0, *(ratios[way].ratio for way in ways))
        for scope in SCOPES:
            line = ", ".join(f"{space} {best / ratios[f'{space}, {scope}'].ratio:.2f}" for space in ("SP", "IP"))
            print(f"{name}, batch {batch}, {SCOPES[scope]}: {line} (IP: at least {goal})")
        print(f"{name}, batch {batch}, not pruned, prepared: {best / ratios['dense, prepared'].ratio:.2f}")
        print("  to plain torch: " + "; ".join(f"{way} {ratio}" for way, ratio in ratios.items()), flush=True)
    print()


if __name__ == "__main__":
    main()
