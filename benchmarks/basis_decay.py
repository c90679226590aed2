"""What weight decay of the bases does, and what Muon does with them.

    python benchmarks/basis_decay.py > benchmarks/results/basis_decay.txt

The network and the images of `benchmarks/switch.py digits`, a standard basis for each layer: trained, pruned to 90 % by
LAMP, fine-tuned; accuracies on held-out images, mean of the seeds with the 95 % interval of the paired difference.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from switch import SETTINGS, images, interval, small
from torch import Tensor, nn

from ip_plugin import interspace
from ip_plugin.methods import lamp, prune

#: {name: (optimizer, learning rate, weight decay)}
OPTIMIZERS = {
    "SGD, 5e-4": ("sgd", 0.05, 5e-4),
    "SGD, 5e-3": ("sgd", 0.05, 5e-3),
    "AdamW, 0.05": ("adamw", 3e-3, 0.05),
    "AdamW, 0.5": ("adamw", 3e-3, 0.5),
    "Muon for 2-D, 0.1": ("muon", 3e-3, 0.1),
}


def bases(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".basis")]


def optimizers(model: nn.Module, kind: str, lr: float, decay: float, like_others: bool) -> list[torch.optim.Optimizer]:
    """Bases get what other Parameters get, or no weight decay (and AdamW instead of Muon)."""
    own = {id(basis) for basis in bases(model)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    groups = [
        {"params": rest, "weight_decay": decay},
        {"params": bases(model), "weight_decay": decay if like_others else 0.0},
    ]
    if kind == "sgd":
        return [torch.optim.SGD(groups, lr=lr, momentum=0.9)]
    if kind == "adamw":
        return [torch.optim.AdamW(groups, lr=lr)]
    flat = [parameter for parameter in rest if parameter.ndim == 2] + (bases(model) if like_others else [])
    chosen = {id(parameter) for parameter in flat}
    groups = [{**group, "params": [p for p in group["params"] if id(p) not in chosen]} for group in groups]
    return [torch.optim.Muon(flat, lr=0.02, weight_decay=decay), torch.optim.AdamW(groups, lr=lr)]


def run(constraint: str, optimizer: str, like_others: bool, seed: int, epochs: int) -> tuple[float, float, float]:
    """Accuracy of the trained network and of the pruned one in percent, and the mean norm of its filters."""
    torch.manual_seed(seed)
    model = interspace(small(), constraint=constraint)  # type: ignore[arg-type]
    x, y, held_out, labels = images("digits", None, test=False)
    order = torch.Generator().manual_seed(seed)
    batch = SETTINGS["digits"].batch

    def train(epochs: int) -> None:
        all_of_them = optimizers(model, *OPTIMIZERS[optimizer], like_others)
        steps = epochs * math.ceil(len(y) / batch)
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, steps) for each in all_of_them]
        for _ in range(epochs):
            for chosen in torch.randperm(len(y), generator=order).split(batch):
                model.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                for each in (*all_of_them, *schedules):
                    each.step()

    @torch.no_grad()
    def accuracy() -> float:
        return 100 * float((model(held_out).argmax(1) == labels).double().mean())

    train(epochs)
    dense = accuracy()
    prune(model, lamp, sparsity=0.9)
    train(epochs // 2)
    return dense, accuracy(), float(torch.cat([basis.detach().norm(dim=1) for basis in bases(model)]).mean())


@torch.no_grad()
def decayed_alone(constraint: str, steps: int = 10_000) -> float:
    """Relative change of the outputs when bases decay (learning rate times decay is 1.5e-4) and nothing is trained."""
    torch.manual_seed(0)
    model = interspace(small(), basis="orthonormal", constraint=constraint)  # type: ignore[arg-type]
    x: Tensor = images("digits", None, test=False)[2]
    before = copy.deepcopy(model)(x)
    for _ in range(steps):
        for basis in bases(model):
            basis.mul_(1 - 1.5e-4)
    return float((model(x) - before).norm() / before.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python benchmarks/basis_decay.py --seeds {args.seeds} --epochs {args.epochs}"
    print(f"{command}   (torch {torch.__version__})\n")
    for constraint in ("none", "unit"):
        print(f"{constraint}: outputs change by {decayed_alone(constraint):.1e} in 10,000 steps of decay alone")
    print("\nEach: accuracy of the trained network, at 90 %, mean norm of the filters; last the difference at 90 %")
    print("constraint  optimizer, decay    bases as others               bases without decay           difference")
    for constraint in ("none", "unit"):
        for optimizer in OPTIMIZERS:
            results = {
                like_others: [run(constraint, optimizer, like_others, s, args.epochs) for s in range(args.seeds)]
                for like_others in (True, False)
            }
            means = [[sum(values) / args.seeds for values in zip(*results[key], strict=True)] for key in (True, False)]
            pairs = zip(results[True], results[False], strict=True)
            mean, half = interval([ours[1] - other[1] for ours, other in pairs])
            columns = "         ".join(f"{dense:8.1f} {kept:6.1f} {norm:8.3f}" for dense, kept, norm in means)
            print(f"{constraint:10}  {optimizer:18} {columns}          {mean:+.1f} ± {half:.1f}", flush=True)


if __name__ == "__main__":
    main()
