"""Pruning a trained network without training it, in bases that are fitted to its kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from ...basis.fitting import Keep, Kernels, fit, kernel_rows, largest
from ...core.convert import Sharing, bake, groups_of, interspace
from ...core.tensor_ref import Model, TensorRef, by_basis, check_finite, prunable_tensors
from ...errors import InvalidScopeError
from ..derivatives import Batches, pair
from ..schedules import Score, prune, whole
from ..scores import magnitude
from ..selection import least, pruned
from .reconstruction import estimates, reconstruct, reestimate_batch_norm
from .refinement import refine

#: Rounds of pruning where there is data.
_ROUNDS = 4


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
    scope (without `min_per_layer`, by `magnitude`). 1x1 convolutions and linear layers have no basis; they are pruned
    in the same budget. The network is one for inference then, or for fine-tuning with a new optimizer.

    Bases are orthonormal while it is chosen how much each layer keeps. Then they are fitted once more without that, and
    so is which coefficients are kept (`refine`).

    With a few batches, the outputs are what counts: pruning goes in rounds, what is left is fitted to the outputs of
    the dense network after each of them (`reconstruct`), and the statistics of BatchNorms are estimated anew in the end
    (`reestimate_batch_norm`).

    Args:
        model: changed in place. Plain, or in the interspace: then its bases are replaced, and the masks that it has
            are applied to the weights before.
        sparsity: of all prunable entries. Bases are not counted; `ip_plugin.report` says how many numbers they have.
        sharing: which layers share a basis, as `ip_plugin.interspace` takes it; None is as the model has it in the
            interspace, and ``"model"`` for a plain one.
        scope: ``"global"``: one threshold, so that the last entry which each layer loses adds equally to the error;
            ``"layer"``: every layer has the same sparsity.
        min_per_layer: how many entries every layer keeps at least.
        score: what is kept, in the fitted bases; `ip_plugin.methods.lamp` leaves more of late layers.
        batches: pairs (inputs, targets), as `reconstruct` takes them. The model is copied, so it must be one that
            ``copy.deepcopy`` takes (`ip_plugin.adopt_masks` helps where `torch.nn.utils.prune` has left masks).
        rounds: as in `prune`; None is 1 without batches and 4 with them.
        orthonormal: leave the bases orthonormal.
        train_basis: whether bases require gradients, as in `ip_plugin.interspace`. Fine-tuned at the learning rate of
            the coefficients, they lose accuracy.
        seed: of the sample of kernels that is looked at first.
        progress: show a progress bar (of the package rich) while bases are fitted.

    Returns:
        The model, in the interspace and masked.

    Raises:
        InvalidScopeError, InvalidScheduleError, NoBatchesError, InvalidBatchError, and as `ip_plugin.interspace` and
            `select`: the model is as it was.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> model = prune_fitted(model, sparsity=0.8)
    >>> from ip_plugin import report
    >>> report(model).prunable.nonzeros
    547
    """
    if scope not in ("global", "layer"):
        raise InvalidScopeError(scope)
    found_layers = prunable_tensors(model)
    sizes = [layer.parameter.numel() for layer in found_layers]
    least(min_per_layer, sizes, sum(sizes) - pruned(sparsity, None, sum(sizes)))
    if rounds is not None:
        whole(rounds, "rounds", 1)
    groups = _groups(model, sharing)
    for layer in found_layers:
        check_finite(layer.module_name, layer.parameter)
    dense = None
    if batches is not None:
        batches = list(batches)
        estimates(model, [pair(batch)[0] for batch in batches])  # that it runs on them
        dense = copy.deepcopy(model)
    found = _fit(model, groups, 1 - sparsity, scope, seed, progress)
    bake(model)
    for number, members in enumerate(groups):
        names = [layer.module_name for layer in members]
        interspace(model, basis=found[number], sharing=lambda *_: 0, layers=names, train_basis=train_basis)

    def rebuild() -> None:
        if dense is not None and batches is not None:
            reconstruct(model, dense, batches)

    rounds = rounds or (1 if dense is None else _ROUNDS)
    prune(model, score, sparsity=sparsity, rounds=rounds, scope=scope, min_per_layer=min_per_layer, after_round=rebuild)
    if not orthonormal:
        with _watched(progress, "refining bases") as round_done:
            refine(model, dense, seed=seed, round_done=round_done)
        rebuild()
    return model if batches is None else reestimate_batch_norm(model, batches)


def _fit(
    model: nn.Module, groups: list[list[TensorRef]], density: float, scope: str, seed: int, progress: bool
) -> dict[int, Tensor]:
    shared = {layer.module_name: number for number, members in enumerate(groups) for layer in members}
    kernels = [_kernels(layer, shared.get(layer.module_name)) for layer in prunable_tensors(model)]
    keep = largest(density) if scope == "global" else _of_each(largest(density))
    with _watched(progress, "fitting bases") as round_done:
        return fit(kernels, keep, seed=seed, round_done=round_done).bases


def _groups(model: nn.Module, sharing: Sharing | None) -> list[list[TensorRef]]:
    """Layers that share a basis, or are to share one."""
    converted = by_basis(prunable_tensors(model))
    if converted and sharing is None:
        return list(converted.values())
    return groups_of(model, sharing or "model")


def _kernels(layer: TensorRef, group: int | None) -> Kernels:
    if group is None:
        return Kernels(kernel_rows(layer.composed.reshape(-1, 1, 1)), None)
    return Kernels(kernel_rows(layer.composed), group, tuple(layer.parameter.shape[2:]))


def _of_each(keep: Keep) -> Keep:
    """Every layer by itself."""

    def of_each(coefficients: Sequence[Tensor]) -> list[Tensor]:
        return [mask for each in coefficients for mask in keep([each])]

    return of_each


@contextmanager
def _watched(progress: bool, what: str) -> Iterator[Callable[[int, float], None]]:
    if not progress:
        yield lambda number, error: None  # noqa: ARG005
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        task = bar.add_task(what)
        yield lambda number, error: bar.update(task, description=f"{what}: round {number}, relative error {error:.4f}")
