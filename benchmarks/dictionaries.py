"""Whether bases that are not orthonormal, or shared by fewer layers, need fewer coefficients.

    python benchmarks/dictionaries.py cifar10.npz fitted-study

For the networks that ``benchmarks/fitted.py`` has left in the folder: their 3x3 kernels as sparse combinations of a
basis, one threshold for all; the relative error, and the accuracy in percent with BatchNorm statistics estimated anew.
Numbers of bases count in the budget.

The other dictionary is found from the fitted orthonormal one by turns: coefficients as good as they can be, by a search
through all 512 supports of a kernel (what orthogonal matching pursuit does greedily), filters by least squares and
then at unit norm. The best of all rounds is taken. Then the same with coefficients of one bit (signs and a scale for
each layer) to four, rounded after the fit, or with the basis fitted to the rounded ones.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from fitted import TRAINED_ON, dense_network
from torch import Tensor, nn

from ip_plugin.compare.config import Settings
from ip_plugin.compare.tasks import TASKS
from ip_plugin.compare.training import accuracy
from ip_plugin.fitting import Kernels, fit, kernel_rows, largest
from ip_plugin.methods import reestimate_batch_norm
from ip_plugin.ranking import keep_largest

#: Rounds of the search for a dictionary; rounds without gain after which that with rounded coefficients ends.
ROUNDS, PATIENCE = 60, 5
BITS = (1, 2, 3, 4)


def orthonormal(kernels: list[Tensor], groups: list[int], kept: int) -> list[Tensor]:
    """Kernels in fitted bases, one for each group."""
    density = kept / sum(each.numel() for each in kernels)
    parts = [Kernels(each, group, (3, 3)) for each, group in zip(kernels, groups, strict=True)]
    bases = fit(parts, largest(density)).bases
    own = [bases[group].float() for group in groups]
    coefficients = [each @ basis.mT for each, basis in zip(kernels, own, strict=True)]
    masks = keep_largest(coefficients, kept, magnitudes=True)
    return [(c * mask) @ basis for c, mask, basis in zip(coefficients, masks, own, strict=True)]


def dictionary(kernels: list[Tensor], kept: int) -> list[Tensor]:
    """Kernels in one dictionary of unit filters that need not be orthogonal."""
    rows = torch.cat(kernels).double()
    filters = fit([Kernels(rows, 0, (3, 3))], largest(kept / rows.numel())).bases[0]
    best, least = rows, float("inf")
    for _ in range(ROUNDS):
        coefficients = coded(rows, filters, kept)
        error = float((rows - coefficients @ filters).square().sum())
        if error < least:
            best, least = coefficients @ filters, error
        filters = nn.functional.normalize(torch.linalg.lstsq(coefficients, rows).solution)
    return list(best.float().split([len(each) for each in kernels]))


def coded(rows: Tensor, filters: Tensor, kept: int) -> Tensor:
    """The best coefficients of which at most `kept` are not zero, by way of all supports that a kernel can have.

    The best support of each size of each row; then sizes, by a price for a coefficient that makes them few enough.
    """
    n = len(filters)
    supports = torch.tensor(list(itertools.product((False, True), repeat=n)))
    gram = filters @ filters.mT
    both = supports[:, :, None] & supports[:, None]
    inverses = torch.linalg.inv(torch.where(both, gram, torch.eye(n, dtype=rows.dtype))) * both
    # What a support explains of a row is a quadratic form in the row's products with the filters.
    products = rows @ filters.mT
    energies = (products[:, :, None] * products[:, None]).flatten(1) @ inverses.flatten(1).mT
    of_size = supports.sum(1)
    found = [energies[:, of_size == size].max(1) for size in range(n + 1)]
    best = torch.stack([each.values for each in found])
    chosen = torch.stack([supports[of_size == size][each.indices] for size, each in enumerate(found)])
    sizes = torch.arange(n + 1, dtype=rows.dtype)[:, None]
    low, high = 0.0, float(best.max())
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if int((best - price * sizes).argmax(0).sum()) <= kept else (price, high)
    mask = chosen[(best - high * sizes).argmax(0), torch.arange(len(rows))]
    both = mask[:, :, None] & mask[:, None]
    forms = torch.where(both, gram, torch.eye(n, dtype=rows.dtype))
    return torch.linalg.solve(forms, (products * mask)[..., None])[..., 0] * mask


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
    settings = Settings("cifar10", arguments.data, TRAINED_ON, epochs=10)
    train, test = TASKS["cifar10"].load(settings.data, settings.train_images)
    batches = [(images, None) for images in train.images[:1000].split(100)]
    print("seed,sparsity,basis,relative_error,accuracy")
    for seed in range(arguments.seeds):
        for sparsity in (0.8, 0.9):
            model = dense_network(seed, arguments.networks, settings, train)
            convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
            kernels = [kernel_rows(conv.weight).clone() for conv in convolutions]
            count = len(kernels)
            kept = round((1 - sparsity) * sum(each.numel() for each in kernels))
            stages = [conv.out_channels for conv in convolutions]
            found = {
                "standard": [k * m for k, m in zip(kernels, keep_largest(kernels, kept, magnitudes=True), strict=True)],
                "orthonormal, of the model": orthonormal(kernels, [0] * count, kept - 81),
                "orthonormal, of each width": orthonormal(kernels, stages, kept - 81 * len(set(stages))),
                "orthonormal, of each layer": orthonormal(kernels, list(range(count)), kept - 81 * count),
                "not orthonormal, of the model": dictionary(kernels, kept - 81),
                **{
                    f"{basis}, {bits} bits": quantised(kernels, kept - 81 * (basis != "standard"), bits, basis=basis)
                    for bits in BITS
                    for basis in ("standard", "orthonormal", "joint")
                },
            }
            norm = torch.cat(kernels).norm()
            for name, approximated in found.items():
                error = (torch.cat(approximated) - torch.cat(kernels)).norm() / norm
                with torch.no_grad():
                    for conv, each in zip(convolutions, approximated, strict=True):
                        conv.weight.copy_(each.reshape(conv.weight.shape))
                reestimate_batch_norm(model, batches)
                print(f'{seed},{sparsity},"{name}",{error:.4f},{accuracy(model, test):.2f}', flush=True)


if __name__ == "__main__":
    main()
