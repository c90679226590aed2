"""Controls: a criterion whose masks or values are replaced, to tell what of it helps.

After Frankle, Dziugaite, Roy and Carbin, "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?"
(ICLR 2021, arXiv 2009.08576), section 5:

``+shuffled``: the entries of each layer's mask are permuted at random. Each layer keeps as many entries as the
criterion has left it, but not those that it has chosen.

``+reinit``: the mask is kept, and the network is initialised anew: values are drawn by the network's own
initialisation with another seed. In the interspace the bases stay as they are, for the mask belongs to their
coefficients; the coefficients are those of the new weights.

A criterion that prunes at initialisation is trained afterwards, as without a control, and one that prunes a trained
network is fine-tuned after ``+shuffled``. In all other cases a whole training follows: new values have not been
trained, and a mask that arises while training is shuffled on the network as it was at first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ip_plugin.adapters import Criterion, TrainingContext
from ip_plugin.core.masking import masks, set_masks
from ip_plugin.core.tensor_ref import prunable_tensors
from ip_plugin.errors import StudyError
from ip_plugin.utils.seeds import derived_seed


def shuffle_masks(model: nn.Module, seed: int) -> None:
    """Permute the entries of the mask of each layer, in model order; what is masked by others counts, too."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "shuffled masks"))
    shuffled = {}
    for name, mask in masks(model).items():
        order = torch.randperm(mask.numel(), generator=generator)
        shuffled[name] = mask.flatten()[order.to(mask.device)].reshape(mask.shape)
    set_masks(model, shuffled)


@torch.no_grad()
def draw_values(model: nn.Module, fresh: nn.Module) -> None:
    """Give a network the values of a plain one, under its masks and in its bases.

    Args:
        model: in either space; changed in place.
        fresh: the same network in the spatial domain, without masks.
    """
    weights = {ref.module_name: ref.parameter for ref in prunable_tensors(fresh)}
    covered = set()
    for ref in prunable_tensors(model):
        value = weights[ref.module_name].to(ref.parameter.device)
        space = ref.interspace
        ref.parameter.copy_(value if space is None else space.right_inverse(value))
        covered.add(ref.name)
    plain = dict(fresh.state_dict(keep_vars=True))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in plain.keys() & state.keys() - covered:  # biases, norms and their statistics
        state[name].copy_(plain[name])


def _shuffled(criterion: Criterion) -> Criterion:
    def prune(model: nn.Module, amount: Any, training: TrainingContext) -> None:
        whole = criterion.stage == "while training"
        initial = copy.deepcopy(model.state_dict()) if whole else {}
        criterion.prune(model, amount, training)
        shuffle_masks(model, training.seed)
        if whole:
            shuffled = masks(model)
            model.load_state_dict(initial)
            set_masks(model, shuffled)
            training.train()

    trainings = criterion.trainings + (criterion.stage == "while training")
    return replace(criterion, title=f"{criterion.title}; mask shuffled in each layer", prune=prune, trainings=trainings)


def _reinitialised(criterion: Criterion) -> Criterion:
    late = criterion.stage != "at initialisation"

    def prune(model: nn.Module, amount: Any, training: Any) -> None:
        if criterion.stage == "after training":
            training.train()
        criterion.prune(model, amount, training)
        draw_values(model, training.fresh())
        if late:
            training.train()

    return replace(
        criterion, title=f"{criterion.title}; values drawn anew", prune=prune,
        stage="while training" if late else criterion.stage, trainings=criterion.trainings + late,
    )  # fmt: skip


CONTROLS: dict[str, Callable[[Criterion], Criterion]] = {"+shuffled": _shuffled, "+reinit": _reinitialised}


def split(name: str) -> tuple[str, str]:
    """The name of a criterion and its control, which may be empty.

    >>> split("torch:l1+shuffled"), split("tp:l1+variety")
    (('torch:l1', '+shuffled'), ('tp:l1+variety', ''))
    """
    control = next((suffix for suffix in CONTROLS if name.endswith(suffix)), "")
    return name.removesuffix(control), control


def controlled(name: str, criterion: Criterion, control: str) -> Criterion:
    """A criterion with a control.

    Raises:
        StudyError: it removes channels, or prunes nothing.
    """
    if criterion.removes_channels or name == "dense":
        found = f"{name}{control}, which {'prunes nothing' if name == 'dense' else 'removes channels'}"
        raise StudyError("A control must be that of a criterion that masks entries.", found, f"leave out {control}")
    return CONTROLS[control](criterion)
