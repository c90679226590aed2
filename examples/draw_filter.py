"""Draw what interspace pruning does to one filter of a trained network: docs/interspace.png.

A small network is trained on scikit-learn's digits in the interspace; one kernel of its last convolution is shown with
its basis and its coefficients, before and after pruning to three coefficients, beside the same kernel pruned to three
weights. The kernel shown is the one whose pruning errors in both spaces are nearest to the layer's averages::

    python examples/draw_filter.py
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch_prune_pipeline import build, fit, load

from ip_plugin import interspace, normalize

KEPT = 3


def keep_largest(values):
    """Rows of `values` with all but the entries of largest magnitude set to zero."""
    threshold = values.abs().sort(dim=1, descending=True).values[:, KEPT - 1 : KEPT]
    return torch.where(values.abs() >= threshold, values, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "interspace.png")
    output = parser.parse_args().output

    torch.manual_seed(0)
    model = interspace(build(), basis="orthonormal", sharing="model")
    images, labels, _, _ = load()
    fit(model, images, labels, epochs=12)
    normalize(model)

    layer = model[7]
    basis = layer.parametrizations.weight[0].basis.detach()
    coefficients = layer.parametrizations.weight.original.detach().reshape(-1, 9)
    kernels = coefficients @ basis
    pruned = keep_largest(coefficients)
    interspace_kernels, spatial_kernels = pruned @ basis, keep_largest(kernels)
    norms = kernels.norm(dim=1)
    errors = torch.stack([(k - kernels).norm(dim=1) / norms for k in (interspace_kernels, spatial_kernels)])
    shown = (errors - errors.mean(1, keepdim=True)).norm(dim=0).argmin()
    print(f"mean relative error at {KEPT} of 9: interspace {errors.mean(1)[0]:.2f}, spatial {errors.mean(1)[1]:.2f}")

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(9, 4))
    rows = left.subplots(3, 9)
    left.suptitle("The filter basis, shared by all layers, and one kernel's coefficients", fontsize="medium")
    highest = float(coefficients[shown].abs().max())
    for n in range(9):
        draw(rows[0, n], basis[n], float(basis.abs().max()))
        for row, values in ((1, coefficients), (2, pruned)):
            axis, value = rows[row, n], float(values[shown, n])
            axis.bar([0], [value], color="tab:blue", width=0.8)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set(xlim=(-0.8, 0.8), ylim=(-1.1 * highest, 1.1 * highest), xticks=[], yticks=[])
            axis.set_frame_on(False)
            axis.set_xlabel(f"{value:+.2f}" if value else "0", fontsize="x-small")
    for row, text in enumerate(("basis", "coefficients", f"{KEPT} are kept")):
        rows[row, 0].set_ylabel(text)
    panels = right.subplots(3, 1)
    titles = ("the kernel", f"from {KEPT} coefficients (IP)", f"from {KEPT} weights (SP)")
    for axis, kernel, title in zip(panels, (kernels, interspace_kernels, spatial_kernels), titles, strict=True):
        draw(axis, kernel[shown], float(kernels[shown].abs().max()))
        axis.set_title(title, fontsize="medium")
    figure.savefig(output, dpi=130, metadata={"Software": None})


def draw(axis, kernel, highest):
    axis.imshow(kernel.reshape(3, 3).numpy(), cmap="RdBu", vmin=-highest, vmax=highest)
    axis.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main()
