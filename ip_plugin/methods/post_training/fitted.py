"""Prune a trained network without training, in bases that are fitted to its kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from ...basis.fitting import Keep, Kernels, fit, kernel_rows, largest
from ...core.convert import Sharing, bake, groups_of, interspace
from ...core.tensor_ref import Model, TensorRef, by_basis, check_finite, prunable_tensors
from ...errors import ArgumentError, SelectionError, listed
from ..derivatives import Batches, pairs
from ..schedules import Score, check_whole, prune
from ..scores import magnitude
from ..selection import least, pruned
from .reconstruction import estimates, reconstruct, reestimate_batch_norm
from .refinement import refine

#: Elements of the largest kernel that gets a basis (11x11 has 121); the time of a fit grows with the third power.
_LARGEST = 128


def prune_fitted(
    model: Model,
    *,
    sparsity: float,
    sharing: Sharing | None = None,
    scope: Literal["global", "layer"] = "global",
    min_per_layer: int = 0,
    score: Score = magnitude,
    batches: Batches | None = None,
    rounds: int | None = None,
    orthonormal: bool = False,
    train_basis: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Model:
    """Fit bases to the kernels of a trained network, and prune its coefficients in them; see `ip_plugin.basis.fitting`.

    The squared error of all weights together is never above that of magnitude pruning of the same count in the same
    scope (without `min_per_layer`, by `magnitude`). 1x1 convolutions and linear layers have no basis, and kernels of
    more than 128 elements get none; they are pruned within the same total. The result is ready for inference, or for
    fine-tuning with a new optimizer.

    Bases are orthonormal while the number of coefficients that each layer keeps is chosen. Then the bases are fitted
    again without that constraint, together with the choice of coefficients (`refine`).

    With a few batches, layer outputs are approximated instead of weights: pruning runs in rounds, after each of which
    the remaining coefficients are fitted to the outputs of the dense network (`reconstruct`), and the statistics of
    BatchNorms are re-estimated at the end (`reestimate_batch_norm`).

    Args:
        model: changed in place. In the interspace, its masks are applied to the weights, and its bases are replaced.
        sparsity: of all prunable entries. Bases are not counted; `ip_plugin.report` lists their size.
        sharing: which layers share a basis, as in `ip_plugin.interspace`; None keeps the sharing of a model in the
            interspace, and is ``"model"`` for a plain one.
        scope: ``"global"``: one threshold for all layers, so that the last entry that each layer loses adds equally to
            the error; ``"layer"``: every layer has the same sparsity.
        min_per_layer: the least number of entries that every layer keeps.
        score: rates coefficients in the fitted bases; `ip_plugin.methods.lamp` keeps more of late layers.
        batches: pairs (inputs, targets), as `reconstruct` takes them. The model is copied, so it must be one that
            ``copy.deepcopy`` takes (`ip_plugin.adopt_masks` helps where `torch.nn.utils.prune` has left masks).
        rounds: as in `prune`; None is 1 without batches and 4 with them.
        orthonormal: keep the bases orthonormal.
        train_basis: whether bases require gradients, as in `ip_plugin.interspace`. Fine-tuned at the learning rate of
            the coefficients, they lose accuracy.
        seed: of the sample of kernels with which fitting begins.
        progress: show a progress bar (needs the package rich) while bases are fitted.

    Returns:
        The model, in the interspace and masked.

    Raises:
        ArgumentError: of `scope` or `rounds`. BatchError: no batches, or one that is no pair. SelectionError: all
            kernels have more than 128 elements. And as `ip_plugin.interspace` and `select`. In all cases the model is
            as it was.

    Warns:
        UserWarning: which kernels are too large for a basis.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> model = prune_fitted(model, sparsity=0.8)
    >>> from ip_plugin import report
    >>> report(model).prunable.nonzeros
    547
    """
    groups = _checked_groups(model, sparsity, sharing, scope, min_per_layer, rounds)
    dense = None
    if batches is not None:
        batches = list(batches)
        estimates(model, [inputs for inputs, _ in pairs(batches)])  # fails if the model does not run on them
        dense = copy.deepcopy(model)
    names = [[ref.module_name for ref in members] for members in groups]
    group_of = {name: number for number, members in enumerate(names) for name in members}
    keep = largest(1 - sparsity) if scope == "global" else _in_each_layer(largest(1 - sparsity))
    with _progress_bar(progress, "fitting bases") as round_done:
        kernels = (_kernels(ref, group_of.get(ref.module_name)) for ref in prunable_tensors(model))
        bases = fit(list(kernels), keep, seed=seed, round_done=round_done).bases
    bake(model)
    for number, layers in enumerate(names):
        interspace(model, basis=bases[number], sharing=lambda *_: 0, layers=layers, train_basis=train_basis)

    def rebuild() -> None:
        if dense is not None and batches is not None:
            reconstruct(model, dense, batches)

    rounds = rounds or (1 if batches is None else 4)
    prune(model, score, sparsity=sparsity, rounds=rounds, scope=scope, min_per_layer=min_per_layer, after_round=rebuild)
    if not orthonormal:
        with _progress_bar(progress, "refining bases") as round_done:
            refine(model, dense, seed=seed, round_done=round_done)
        rebuild()
    return model if batches is None else reestimate_batch_norm(model, batches)


def _checked_groups(
    model: nn.Module, sparsity: float, sharing: Sharing | None, scope: str, min_per_layer: int, rounds: int | None
) -> list[list[TensorRef]]:
    """The convolutions to convert, in lists of layers that share a basis; raises as `prune_fitted`."""
    if scope not in ("global", "layer"):
        raise ArgumentError(
            '`scope` must be "global" or "layer".', f"{scope!r}", '"global" puts all layers under one threshold'
        )
    refs = prunable_tensors(model)
    sizes = [ref.parameter.numel() for ref in refs]
    least(min_per_layer, sizes, sum(sizes) - pruned(sparsity, None, sum(sizes)))
    if rounds is not None:
        check_whole(rounds, "rounds", 1)
    converted = by_basis(refs)
    groups = list(converted.values()) if converted and sharing is None else groups_of(model, sharing or "model")
    for ref in refs:
        check_finite(ref.module_name, ref.parameter)
    return _of_moderate_size(groups)


def _of_moderate_size(groups: list[list[TensorRef]]) -> list[list[TensorRef]]:
    """The groups without those whose kernels are too large to fit a basis, which a warning names."""
    moderate, large = [], []
    for members in groups:
        if members[0].parameter[0, 0].numel() <= _LARGEST:
            moderate.append(members)
        else:
            large += [ref.module_name for ref in members]
    rule = f"Bases are fitted to kernels of at most {_LARGEST} elements."
    if not moderate:
        raise SelectionError(rule, f"only larger ones: {listed(large)}", "prune with `ip_plugin.methods.prune`")
    if large:
        warnings.warn(f"{rule} Larger ones are pruned as weights: {listed(large)}", stacklevel=4)
    return moderate


def _kernels(ref: TensorRef, group: int | None) -> Kernels:
    if group is None:
        return Kernels(kernel_rows(ref.composed.reshape(-1, 1, 1)), None)
    return Kernels(kernel_rows(ref.composed), group, tuple(ref.parameter.shape[2:]))


def _in_each_layer(keep: Keep) -> Keep:
    """Choose in every layer by itself, instead of in all layers together."""
    return lambda coefficients: [mask for values in coefficients for mask in keep([values])]


@contextmanager
def _progress_bar(progress: bool, what: str) -> Iterator[Callable[[int, float], None]]:
    if not progress:
        yield lambda number, error: None  # noqa: ARG005
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        task = bar.add_task(what)
        yield lambda number, error: bar.update(task, description=f"{what}: round {number}, relative error {error:.4f}")
