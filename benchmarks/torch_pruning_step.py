"""Time of Torch-Pruning in the interspace: `pruner(...).step()`, and a loop over the groups of an interactive step.

    python benchmarks/torch_pruning_step.py

Limits: 1.15 for a step on a ResNet-50, as a ratio to the plain network with the adapter; 1.3 for the loop on a
ResNet-50 and a DenseNet-121, as a ratio to the host's own class on the plain network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch_pruning as tp
import torchvision
from harness import side_by_side
from torch import nn

from ip_plugin import interspace, set_masks
from ip_plugin.adapters.torch_pruning import pruner
from ip_plugin.core.tensor_ref import prunable_tensors


def moved(model: nn.Module) -> nn.Module:
    """As after training: no filter has unit norm."""
    with torch.no_grad():
        for layer in prunable_tensors(model):
            if layer.interspace is not None:
                layer.interspace.basis.mul_(torch.linspace(0.5, 2, len(layer.interspace.basis))[:, None])
    return model


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    plain = torchvision.models.resnet50()
    inter = moved(interspace(copy.deepcopy(plain)))
    x = torch.randn(1, 3, 224, 224)
    masked = set_masks(copy.deepcopy(inter), {layer.module_name: torch.rand(layer.parameter.shape) < 0.5
                                              for layer in prunable_tensors(inter)})  # fmt: skip

    def step(network: nn.Module, with_optimizer: bool, adapted: bool = True) -> Callable[[], Callable[[], None]]:
        def prepare() -> Callable[[], None]:
            model = copy.deepcopy(network)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if with_optimizer else None
            if optimizer is not None:
                for parameter in model.parameters():
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            options = {"importance": tp.importance.GroupMagnitudeImportance(), "pruning_ratio": 0.5,
                       "ignored_layers": [model.fc]}  # fmt: skip

            def run() -> None:
                if adapted:
                    pruner(tp.pruner.BasePruner, model, x, optimizer=optimizer, **options).step()
                else:
                    tp.pruner.BasePruner(model, x, **options).step()

            return run

        return prepare

    found = side_by_side(
        step(plain, False),
        {
            "interspace": step(inter, False),
            "interspace, masked": step(masked, False),
            "plain, with optimizer": step(plain, True),
            "interspace, with optimizer": step(inter, True),
            "host": step(plain, False, adapted=False),
        },
        rounds=20,
        warmup=3,
        prepared=True,
    )
    print(f"torch {torch.__version__}, torch-pruning, ResNet-50, half of the channels, 2 threads; to plain:")
    for name, ratio in found.items():
        print(f"  {name}: {ratio}")
    for name in ("resnet50", "densenet121"):
        interactive(name)


def interactive(name: str) -> None:
    """A loop over the groups of an interactive step; what the constructor takes does not count."""
    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)()
    x = torch.randn(1, 3, 64, 64)

    def loop(network: nn.Module, adapted: bool) -> Callable[[], Callable[[], None]]:
        def prepare() -> Callable[[], None]:
            model = copy.deepcopy(network)
            head = [module for module in model.modules() if isinstance(module, nn.Linear)]
            options = {"importance": tp.importance.GroupMagnitudeImportance(), "pruning_ratio": 0.5,
                       "ignored_layers": head}  # fmt: skip
            cls = tp.pruner.BasePruner
            cutter = pruner(cls, model, x, **options) if adapted else cls(model, x, **options)

            def run() -> None:
                for group in cutter.step(interactive=True):
                    group.prune()

            return run

        return prepare

    variants = {"plain": loop(plain, True), "interspace": loop(moved(interspace(copy.deepcopy(plain))), True)}
    found = side_by_side(loop(plain, False), variants, rounds=10, warmup=2, prepared=True)
    print(f"{name}, for group in pruner.step(interactive=True): group.prune(); to the host:")
    for variant, ratio in found.items():
        print(f"  {variant}: {ratio}")


if __name__ == "__main__":
    main()
