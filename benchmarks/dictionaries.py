"""How few coefficients kernels need in bases that are orthonormal or not, and shared by more or fewer layers.

    python benchmarks/dictionaries.py cifar10.npz fitted-study

For the networks that ``benchmarks/fitted.py`` has left in the folder: their 3x3 kernels as sparse combinations of a
basis; the relative error, and the accuracy in percent with BatchNorm statistics estimated anew. One threshold for all
says how much each layer keeps. Numbers of bases count in the budget.

Then the same with coefficients of one bit (signs and a scale for each layer) to four in orthonormal bases, rounded
after the fit, or with the basis fitted to the rounded ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fitted import TRAINED_ON, dense_network
from torch import Tensor, nn

from ip_plugin.basis.dictionary import learn
from ip_plugin.basis.fitting import Kernels, fit, kernel_rows, largest
from ip_plugin.compare import Study
from ip_plugin.compare.cell import images_of
from ip_plugin.compare.data import Split
from ip_plugin.compare.training import accuracy
from ip_plugin.methods import reestimate_batch_norm
from ip_plugin.utils.topk import keep_largest

#: Rounds without gain after which the search for a basis for rounded coefficients ends.
PATIENCE = 5
BITS = (1, 2, 3, 4)


def approximated(kernels: list[Tensor], groups: list[int], kept: int, *, orthonormal: bool) -> list[Tensor]:
    """Kernels in fitted bases, one for each group."""
    density = kept / sum(each.numel() for each in kernels)
    parts = [Kernels(each, group, (3, 3)) for each, group in zip(kernels, groups, strict=True)]
    bases = fit(parts, largest(density)).bases
    coefficients = [each @ bases[group].mT.float() for each, group in zip(kernels, groups, strict=True)]
    masks = keep_largest(coefficients, kept, magnitudes=True)
    made = [(c * mask) @ bases[group].float() for c, mask, group in zip(coefficients, masks, groups, strict=True)]
    for group, start in () if orthonormal else bases.items():
        places = [place for place, its in enumerate(groups) if its == group]
        found = learn([parts[place] for place in places], [int(masks[place].sum()) for place in places], start)
        for place, each in zip(places, found.codes, strict=True):
            made[place] = each.coefficients @ found.basis.float()
    return made


def quantised(kernels: list[Tensor], kept: int, bits: int, *, basis: str) -> list[Tensor]:
    """Kernels by coefficients of few bits, with a scale for each layer.

    Args:
        basis: "standard"; "orthonormal", fitted without rounding; or "joint", fitted to the rounded coefficients.
    """
    filters = torch.eye(9)
    if basis != "standard":
        filters = fit([Kernels(torch.cat(kernels), 0, (3, 3))], largest(kept / sum(map(torch.numel, kernels)))).bases[0]
    best, least, stale = kernels, float("inf"), 0
    while stale < PATIENCE:
        coefficients = [each @ filters.mT.float() for each in kernels]
        masks = keep_largest(coefficients, kept, magnitudes=True)
        coefficients = [rounded(c, mask, bits) for c, mask in zip(coefficients, masks, strict=True)]
        found = [c @ filters.float() for c in coefficients]
        error = float((torch.cat(found) - torch.cat(kernels)).square().sum())
        stale = 0 if error < least * (1 - 1e-5) else stale + 1
        if error < least:
            best, least = found, error
        if basis != "joint":
            break
        moment = (torch.cat(coefficients).mT @ torch.cat(kernels)).double()
        left, _, right = torch.linalg.svd(moment)
        filters = left @ right
    return best


def rounded(coefficients: Tensor, mask: Tensor, bits: int) -> Tensor:
    """The masked coefficients, each one of ``2**bits`` values around zero, with the best scale.

    One bit is a sign and no magnitude; the values are odd multiples of half a step, as zero needs no code.
    """
    most = 2 ** (bits - 1) - 0.5
    best, least = coefficients * mask, float("inf")
    top = coefficients[mask].abs().max() if mask.any() else torch.tensor(1.0)
    for part in torch.linspace(0.02, 1, 99):
        step = part * top / most
        level = ((coefficients.abs() / step - 0.5).round() + 0.5).clamp(0.5, most)
        found = torch.where(mask, level * step * coefficients.sign(), 0)
        error = float((found - coefficients * mask).square().sum())
        if error < least:
            best, least = found, error
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("networks", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = {"source": arguments.data, "train_images": TRAINED_ON, "augment": ("RandomHorizontalFlip",)}
    study = Study(data=data, training={"epochs": 10})
    loaded = images_of(study)
    train, test = loaded.train, loaded.test
    assert isinstance(train, Split)
    batches = [(images, None) for images in train.images[:1000].split(100)]
    print("seed,sparsity,basis,relative_error,accuracy")
    for seed in range(arguments.seeds):
        for sparsity in (0.8, 0.9):
            model = dense_network(seed, arguments.networks, study, loaded)
            convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
            kernels = [kernel_rows(conv.weight).clone() for conv in convolutions]
            count = len(kernels)
            kept = round((1 - sparsity) * sum(each.numel() for each in kernels))
            sharing = {
                "the model": [0] * count,
                "each width": [conv.out_channels for conv in convolutions],
                "each layer": list(range(count)),
            }
            found = {
                "standard": [k * m for k, m in zip(kernels, keep_largest(kernels, kept, magnitudes=True), strict=True)],
                **{
                    f"{kind}, of {whose}": approximated(
                        kernels, groups, kept - 81 * len(set(groups)), orthonormal=kind == "orthonormal"
                    )
                    for kind in ("orthonormal", "not orthonormal")
                    for whose, groups in sharing.items()
                },
                **{
                    f"{basis}, {bits} bits": quantised(kernels, kept - 81 * (basis != "standard"), bits, basis=basis)
                    for bits in BITS
                    for basis in ("standard", "orthonormal", "joint")
                },
            }
            norm = torch.cat(kernels).norm()
            for name, made in found.items():
                error = (torch.cat(made) - torch.cat(kernels)).norm() / norm
                with torch.no_grad():
                    for conv, each in zip(convolutions, made, strict=True):
                        conv.weight.copy_(each.reshape(conv.weight.shape))
                reestimate_batch_norm(model, batches)
                print(f'{seed},{sparsity},"{name}",{error:.4f},{accuracy(model, test):.2f}', flush=True)


if __name__ == "__main__":
    main()
