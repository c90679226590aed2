"""Whether bases that are not orthonormal, or shared by fewer layers, need fewer coefficients.

    python benchmarks/dictionaries.py cifar10.npz fitted-study

For the networks that ``benchmarks/fitted.py`` has left in the folder: their 3x3 kernels as sparse combinations of a
basis, one threshold for all; the relative error, and the accuracy in percent with BatchNorm statistics estimated anew.
Numbers of bases count in the budget.

The other dictionary is found from the fitted orthonormal one by turns: coefficients by iterative hard thresholding (a
gradient step, then the largest by their part in the kernel), their values by least squares on the support, filters by
least squares and then at unit norm. The best of all rounds is taken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fitted import TRAINED_ON, trained
from torch import Tensor, nn

from ip_plugin.compare.config import Settings
from ip_plugin.compare.tasks import TASKS
from ip_plugin.compare.training import accuracy
from ip_plugin.fitting import Kernels, fit, kernel_rows, largest
from ip_plugin.methods import reestimate_batch_norm
from ip_plugin.ranking import keep_largest

ROUNDS = 30


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
    parts = [Kernels(rows, 0, (3, 3))]
    filters = fit(parts, largest(kept / rows.numel())).bases[0]
    coefficients = rows @ filters.mT
    coefficients *= keep_largest([coefficients], kept, magnitudes=True)[0]
    best, least = coefficients @ filters, float("inf")
    for _ in range(ROUNDS):
        gram = filters @ filters.mT
        step = 1 / torch.linalg.eigvalsh(gram)[-1]
        for _ in range(5):
            coefficients = coefficients + step * (rows - coefficients @ filters) @ filters.mT
            coefficients *= keep_largest([coefficients], kept, magnitudes=True)[0]
        mask = coefficients != 0
        both = mask[:, :, None] & mask[:, None]
        forms = torch.where(both, gram, 0) + torch.diag_embed((~mask).double())
        coefficients = torch.linalg.solve(forms, (rows @ filters.mT * mask)[..., None])[..., 0] * mask
        error = float((rows - coefficients @ filters).square().sum())
        if error < least:
            best, least = coefficients @ filters, error
        filters = torch.linalg.lstsq(coefficients, rows).solution
        norms = torch.linalg.vector_norm(filters, dim=1)
        filters, coefficients = filters / norms[:, None], coefficients * norms
    return list(best.float().split([len(each) for each in kernels]))


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
            model = trained(seed, arguments.networks, settings, train)
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
