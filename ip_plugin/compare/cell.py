"""One cell of a study: train, prune and measure one network.

The two spaces of a pair start from the same weights, see the same batches in the same order and keep the same number of
parameters: where ordinary pruning keeps k values, interspace pruning keeps k minus the size of its bases, trained or
frozen. Where channels are removed, both spaces keep equally many; the network of the interspace is then baked, and has
no bases.
"""

from __future__ import annotations

import copy
import math
import time
import warnings

import torch
from torch import nn

from ip_plugin import interspace, prunable, report
from ip_plugin.adapters import Criterion
from ip_plugin.core.convert import basis_pays, groups_of
from ip_plugin.core.masking import masks
from ip_plugin.core.tensor_ref import by_basis, prunable_tensors
from ip_plugin.errors import InterspaceError, LayerCollapseWarning, StudyError
from ip_plugin.reporting.table import Row
from ip_plugin.utils.seeds import derived_seed, seeded

from . import criteria, data, models
from .config import DENSE, Cell, SpaceSpec, Study
from .data import Images, Part
from .deployment import latencies, saved, stored
from .named import blamed, named, place
from .record import Record, Result
from .training import OnEpoch, Training, TrainingCache, accuracy

#: How many learned bases are kept in a record.
_BASES = 8


def execute(cell: Cell, study: Study, on_epoch: OnEpoch = lambda _: None, cache: TrainingCache | None = None) -> Record:
    """Run one cell. Equal arguments give equal results (on one machine, with one number of threads).

    Args:
        cell, study: which cell, and its study.
        on_epoch: called after each epoch; `epochs_of` says how often.
        cache: of trainings of other cells of the study; it changes nothing but the time.

    Raises:
        StudyError: the network is too small for the sparsity, a part of the study is not what it must be, the criterion
            fails or prunes another number of entries, or latencies cannot be measured here.
    """
    from .tuning import tuned_settings

    started = time.perf_counter()
    criterion, space, images = criteria.load(cell.criterion), SpaceSpec.parse(cell.space), images_of(study)
    settings = tuned_settings(study, cell.space)
    image = images.example
    with seeded(cell.seed, settings.device), warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)  # criteria are compared with the layers that they empty
        model = network_of(study, images)
        dense = copy.deepcopy(model).eval()
        before = {layer.module_name: layer.parameter.numel() for layer in prunable_tensors(model)}
        parameters = sum(before.values())
        macs = report(model, image).prunable.macs_dense
        spatial_layers = convert(model, cell, space, criterion)
        basis_parameters = report(model).prunable.basis_parameters
        amount = _amount(cell, criterion, parameters, basis_parameters)

        def fresh() -> nn.Module:
            with seeded(derived_seed(cell.seed, "values drawn anew"), settings.device):
                return network_of(study, images)

        torch.manual_seed(derived_seed(cell.seed, "pruning"))
        training = Training(model, images, settings, cell.seed, on_epoch, cache, fresh)
        reached_before = train_and_prune(criterion, amount, training, images.test, cell.criterion)
    measured = report(model, image)
    left = measured.prunable
    reached = accuracy(model, images.test)
    held_out = None if images.validation is None else accuracy(model, images.validation)
    seconds = time.perf_counter() - started
    contents = saved(model)
    threads = study.measure.deploy_threads
    kept = {layer.module_name: _kept(layer.parameter, layer.mask) for layer in prunable_tensors(model)}
    files = {}
    if "models" in study.measure.keep:
        files["model.safetensors"] = contents
    if "masks" in study.measure.keep:
        files["masks.safetensors"] = stored(masks(model))
    result = Result(
        accuracy=reached, accuracy_before_pruning=reached_before, parameters=parameters,
        parameters_left=left.nonzeros + (0 if criterion.removes_channels or not amount else basis_parameters),
        basis_parameters=basis_parameters, spatial_layers=spatial_layers, seconds=seconds, macs=macs,
        macs_left=sum(_macs_left(row) for row in measured.rows), file_bytes=len(contents),
        validation_accuracy=held_out, lr=settings.lr,
        **({} if threads is None else latencies(model, dense, image, threads)),
    )  # fmt: skip
    density = {name: round(kept.get(name, 0) / number, 6) for name, number in before.items()}
    return Record(cell, result, curve=tuple(training.curve), density=density, bases=_bases(model), files=files)


def images_of(study: Study) -> Images:
    """The data of a study, on its device."""
    return data.load(study.data, study.training.device, study.training.workers)


def network_of(study: Study, images: Images) -> nn.Module:
    """A new network of a study, initialised from torch's random state, on the study's device."""
    model = models.network(study.model, images.classes, images.example)
    layout = torch.channels_last if study.training.channels_last else torch.preserve_format
    return model.to(study.training.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _macs_left(row: Row) -> int:
    """The multiply-adds of a layer by its non-zeros and its basis, or of the dense layer if they are fewer."""
    dense, nonzero, basis = (count or 0 for count in (row.macs_dense, row.macs_nonzero, row.macs_basis))
    return min(dense, nonzero + basis)


def _kept(parameter: torch.Tensor, mask: torch.Tensor | None) -> int:
    return parameter.numel() if mask is None else int(mask.sum())


def _bases(model: nn.Module) -> dict[str, list[list[float]]]:
    """The filters of the bases, by the name of the first layer that has each."""
    bases = {}
    for layers in list(by_basis(prunable_tensors(model)).values())[:_BASES]:
        assert layers[0].interspace is not None
        filters = layers[0].interspace.effective_basis.detach().cpu().double()
        bases[layers[0].module_name] = [[round(value, 5) for value in row] for row in filters.tolist()]
    return bases


def train_and_prune(
    criterion: Criterion, amount: float, training: Training, test: Part, name: str = ""
) -> float | None:
    """Train, prune and fine-tune a network in the order that the criterion's stage says.

    Args:
        criterion, amount: as `ip_plugin.adapters.Criterion` says.
        training: of the network.
        test: test images.
        name: of the criterion, for messages.

    Returns:
        The accuracy on `test` before pruning, if the network is pruned between training and fine-tuning.

    Raises:
        StudyError: the criterion fails, or does not prune `amount`.
    """
    if criterion.stage != "after training":
        _prune(criterion, amount, training, name)
        if criterion.stage == "at initialisation":
            training.train()
        return None
    training.train()
    before = accuracy(training.model, test)
    _prune(criterion, amount, training, name)
    training.finetune()
    return before


def _prune(criterion: Criterion, amount: float, training: Training, name: str) -> None:
    """Let a criterion prune, and check that it has pruned what it was asked for."""
    before = sum(layer.parameter.numel() for layer in prunable_tensors(training.model))
    try:
        criterion.prune(training.model, amount, training)
    except StudyError:
        raise
    except InterspaceError as error:
        rule = f"The criterion {name!r} must prune without an error. {error.rule}"
        raise type(error)(rule, error.found + place(error), error.remedy) from error
    except Exception as error:  # code of other people
        rule = f"The criterion {name!r} must prune without an error."
        raise StudyError(rule, blamed(error), "correct it; the traceback is in the record of the run") from error
    layers = prunable_tensors(training.model)
    size = sum(layer.parameter.numel() for layer in layers)
    pruned = sum(layer.parameter.numel() - _kept(layer.parameter, layer.mask) for layer in layers)
    if name == DENSE:
        return
    if criterion.removes_channels:
        if amount and size >= before:
            found = f"{size} parameters before and after it"
            raise StudyError(f"The criterion {name!r} must remove channels.", found, "correct it")
    elif size != before or pruned != amount:
        rule = f"The criterion {name!r} must prune exactly {amount} of {before} entries, by masks."
        found = f"{pruned} pruned entries" + (f" of {size}" if size != before else "")
        raise StudyError(rule, found, "prune the tensors of ip_plugin.prunable(model) to the count it is called with")


def epochs_of(cell: Cell, study: Study) -> int:
    """Number of epochs that a cell takes."""
    criterion = criteria.load(cell.criterion)
    finetunings = 1 if criterion.stage == "after training" else criterion.finetunings
    return criterion.trainings * study.training.epochs + finetunings * study.training.finetune_epochs


def _amount(cell: Cell, criterion: Criterion, parameters: int, basis_parameters: int) -> float:
    """The share of channels to remove, or the number of entries to prune, which pays for the bases."""
    if criterion.removes_channels or cell.criterion == DENSE:
        return cell.sparsity
    kept = round((1 - cell.sparsity) * parameters)
    if kept - basis_parameters < 1:
        found = f"{cell}: {kept} of {parameters} at sparsity {cell.sparsity:g}, {basis_parameters} of them in bases"
        raise StudyError("A run must keep at least one parameter.", found, "compare at a lower sparsity")
    return parameters - kept + basis_parameters


def check_budgets(study: Study) -> None:
    """Find what cannot run before anything does: data, model, criteria, and budgets that are smaller than the bases.

    Raises:
        StudyError: a part of the study is not there, or the budget of a cell is too small.
    """
    from .tuning import check_tuning

    check_tuning(study)
    if study.training.function is not None:
        named(study.training.function, "training function")
    images = images_of(study)
    with seeded(0, study.training.device):
        model = network_of(study, images)
    parameters = sum(getattr(*target).numel() for target in prunable(model))
    for cell in Study.model_copy(study, update={"seeds": study.seeds[:1]}).cells():
        criterion, space = criteria.load(cell.criterion), SpaceSpec.parse(cell.space)
        network = copy.deepcopy(model)
        convert(network, cell, space, criterion)
        _amount(cell, criterion, parameters, report(network).prunable.basis_parameters)


def convert(model: nn.Module, cell: Cell, space: SpaceSpec, criterion: Criterion) -> tuple[str, ...]:
    """Move layers to the interspace, if that is the space; returns the names of the convolutions that stay spatial.

    A group of layers stays spatial if its basis has more parameters than the sparsity leaves to the group. Where
    channels are removed, bases cost nothing.
    """
    if space.kind == "spatial":
        return ()
    converted: list[str] = []
    spatial: list[str] = []
    share = math.inf if criterion.removes_channels else 1 - cell.sparsity
    for members in groups_of(model, space.sharing):
        names = converted if basis_pays(members, share) else spatial
        names.extend(layer.module_name for layer in members)
    if converted:
        options = {name: getattr(space, name) for name in ("basis", "sharing", "constraint")}
        interspace(model, layers=converted, seed=cell.seed, **options)
        if space.frozen:
            for basis in by_basis(prunable_tensors(model)):
                basis.requires_grad_(False)
    return tuple(spatial)
