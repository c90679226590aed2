"""What a user can get wrong: one ``ValueError`` for each kind of mistake; the words stand where it is raised.

Every message says three things: the rule (what was looked for), what was found, what to do.

>>> import torch, ip_plugin
>>> try:
...     ip_plugin.interspace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), layers=["1"])
... except ip_plugin.errors.SelectionError as error:
...     print(error)
Every name in `layers` must be the name of a module of the model.
Found: no module '1'
What to do: use names from `model.named_modules()`; the closest are '0'
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names quoted, comma-separated, and cut after `most` of them, for a message."""
    quoted = [repr(name) for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest} more" if rest > 0 else "")


_listed = listed


class InterspaceError(ValueError):
    """Base of all errors of this package.

    Args:
        rule: what was looked for.
        found: what was found instead.
        remedy: what to do.
    """

    def __init__(self, rule: str, found: str, remedy: str) -> None:
        super().__init__(f"{rule}\nFound: {found}\nWhat to do: {remedy}")
        self.rule, self.found, self.remedy = rule, found, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.rule, self.found, self.remedy)


def _rebuild(cls: type[InterspaceError], rule: str, found: str, remedy: str) -> InterspaceError:
    error = cls.__new__(cls)
    InterspaceError.__init__(error, rule, found, remedy)
    return error


class SelectionError(InterspaceError):
    """Layers, tensors or modules that were named or selected, and that are not there, not suitable or given twice."""


class ConversionError(InterspaceError):
    """A model that cannot be converted as it is: parametrized, pruned, tied, wrapped, compiled, not finite."""


class BasisError(InterspaceError):
    """A basis that cannot represent every kernel, or layers that cannot share one."""


class MaskError(InterspaceError):
    """A mask that does not fit its tensor, or that is missing."""


class AmountError(InterspaceError):
    """An amount, a sparsity or a minimum that is no number, or outside of what there is to prune."""


class ScoreError(InterspaceError):
    """Importance scores of a wrong shape, or that are not finite."""


class ArgumentError(InterspaceError):
    """An option whose value is not understood."""


class OptimizerError(InterspaceError):
    """An optimizer that does not train the model."""


class BatchError(InterspaceError):
    """Inputs, targets, outputs or a loss that the model or a criterion cannot use."""


class CheckpointError(InterspaceError):
    """A checkpoint that cannot be written, is corrupt, or belongs to another model."""


class HostError(InterspaceError):
    """What a pruning library (the host) was given, or did, and what cannot be carried over to coefficients."""


class SparseExecutionError(InterspaceError):
    """Something that a sparse network cannot run."""


class StudyError(InterspaceError):
    """A study that cannot be run as asked, or a results folder that is not its own."""


class LayerCollapseWarning(UserWarning):
    """A layer keeps almost nothing, or nothing, of what passes through it, while others keep much more."""


class SparseFallbackWarning(UserWarning):
    """A network is run sparse layer by layer, because its graph cannot be traced."""


# Classes below are being replaced by those above.


class NoLayerMatchedError(InterspaceError):
    """`interspace` was given nothing that it can convert."""

    def __init__(self, convolutions: int, selected: bool) -> None:
        super().__init__(
            "At least one convolution whose kernel has more than one element must be selected.",
            f"{convolutions} such convolutions in the model, none of them "
            f"{'selected by `layers`' if selected else 'there to convert'}",
            "pass a model with convolutions larger than 1x1, or widen `layers`",
        )


class UnknownLayerError(InterspaceError):
    """A layer name that the model does not have."""

    def __init__(self, name: str, known: Iterable[str], argument: str = "layers") -> None:
        known = [n for n in known if n]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        super().__init__(
            f"Every name in `{argument}` must be the name of a module of the model.",
            f"no module {name!r}",
            f"use names from `model.named_modules()`; the closest are {_listed(close)}",
        )


class LayerSelectionError(InterspaceError):
    """`layers` is neither None, nor names, nor a predicate."""

    def __init__(self, layers: object) -> None:
        super().__init__(
            "`layers` must be None, an iterable of module names, or a predicate (name, module) -> bool.",
            f"{type(layers).__name__} {layers!r}",
            f"write layers=[{layers!r}]" if isinstance(layers, str) else "pass a list of names",
        )


class NotConvertibleError(InterspaceError):
    """A layer that was named in `layers` and that has no interspace representation."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            "Only convolutions whose kernel has more than one element have a filter basis.",
            f"layer {name!r}: {reason}",
            f"leave {name!r} out of `layers`; it stays spatial and can be pruned all the same",
        )


class AlreadyInterspaceError(InterspaceError):
    """A layer is in the interspace already."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            "A layer can be moved to the interspace once.",
            f"already there: {_listed(names)}",
            "select the other layers with `layers=`, or call `ip_plugin.bake(model)` first",
        )


class AlreadyParametrizedError(InterspaceError):
    """Someone else's parametrization sits on a weight that this package was to take."""

    def __init__(
        self,
        name: str,
        parametrization: str,
        remedy: str = "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first, "
        "or leave the layer out",
        tensor_name: str = "weight",
    ) -> None:
        super().__init__(
            "The weight of a layer must not be parametrized by someone else.",
            f"layer {name!r}: {tensor_name} parametrized by {parametrization}",
            remedy,
        )

    @classmethod
    def beside_ours(cls, name: str, others: Iterable[object], tensor_name: str = "weight") -> AlreadyParametrizedError:
        """Other parametrizations sit on a tensor, or on a layer, that has one of this package too."""
        return cls(
            name,
            ", ".join(type(other).__name__ for other in others) + ", besides that of ip_plugin",
            "bake the model first and add the other parametrization afterwards; to rescue a trained model, copy "
            "`layer.weight` into a plain model (torch's remove_parametrizations would damage the layer)",
            tensor_name,
        )


class AlreadyPrunedError(InterspaceError):
    """A weight that is to move to the interspace carries a mask."""

    def __init__(self, name: str, how: str) -> None:
        super().__init__(
            "A weight that moves to the interspace must not be pruned: its mask is one of weights, not coefficients.",
            f"layer {name!r}: pruned {how}",
            "convert first and prune then, or make the zeros permanent with ip_plugin.bake(model) before",
        )


class TiedWeightError(InterspaceError):
    """A weight that several modules share cannot be written in one module's basis."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            "The weight of a layer that moves to the interspace must belong to that layer alone.",
            f"one Parameter is the weight of {_listed(names)}",
            "untie the weights, or leave these layers out with `layers=`",
        )


class WrappedModelError(InterspaceError):
    """The model was handed to a wrapper that has already listed its parameters."""

    def __init__(self, wrapper: str) -> None:
        super().__init__(
            "A model must be converted before it is wrapped: the wrapper would not see the new bases.",
            f"the model is or contains a {wrapper}",
            f"call interspace(model) first, then {wrapper}(model)",
        )


class SharingError(InterspaceError):
    """Layers that cannot use one basis were put together, or `sharing` is not understood."""

    @classmethod
    def unknown(cls, found: str) -> SharingError:
        """`sharing` itself is not understood."""
        return cls(
            '`sharing` must be "layer", "model" or a callable (name, module) -> hashable.',
            found,
            'pass one of these; "layer" gives every layer a basis of its own',
        )

    @classmethod
    def mismatch(cls, what: str, first: str, its: object, second: str, other: object) -> SharingError:
        """Two layers of one group differ in `what`."""
        return cls(
            f"Layers that share a basis must have the same {what}.",
            f"layer {first!r} has {what} {its}, layer {second!r} has {what} {other}",
            f"let `sharing` return different keys for them, for example (key, {what})",
        )


class InvalidBasisError(InterspaceError):
    """A basis that cannot represent every kernel, or whose inverse would lose the weights' digits."""

    def __init__(self, rule: str, found: str, remedy: str = 'use "standard", "orthonormal" or "dct"') -> None:
        super().__init__(rule, found, remedy)


class NonFiniteWeightError(InterspaceError):
    """NaN or infinity in a weight."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(
            "Weights must be finite to be written in a basis.",
            f"layer {name!r}: {count} NaN or infinite values",
            "take a model that has not diverged",
        )


class UnsupportedDtypeError(InterspaceError):
    """A weight that is neither a real floating point tensor nor initialised."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(
            "Weights must be real floating point tensors (float16, bfloat16, float32, float64).",
            f"layer {name!r}: {dtype}",
            f"convert the layer with .float(), or leave {name!r} out of `layers`",
        )


class InvalidMaskError(InterspaceError):
    """A mask that does not fit the layer that it is for."""

    def __init__(self, name: str, found: str, shape: Sequence[int]) -> None:
        super().__init__(
            f"The mask of layer {name!r} must be a tensor of shape {tuple(shape)} of bools (or zeros and ones).",
            found,
            "make it like the tensor that `ip_plugin.prunable(model)` names; True keeps an entry",
        )


class InvalidAmountError(InterspaceError):
    """An amount to prune outside of what there is."""


class InvalidScoresError(InterspaceError):
    """Importance scores that do not fit the tensor that they are for."""

    def __init__(self, tensor_name: str, shape: Sequence[int], found: Sequence[int]) -> None:
        super().__init__(
            f"Importance scores must have the shape of the tensor that they are for: {tensor_name!r}, {tuple(shape)}.",
            f"shape {tuple(found)}",
            "compute one score for each entry of the tensor that is pruned",
        )


class NothingToPruneError(InterspaceError):
    """A pruning call without a single target."""

    def __init__(self) -> None:
        super().__init__(
            "At least one (module, tensor name) pair must be given.",
            "an empty iterable (a generator that was used up before?)",
            "pass ip_plugin.prunable(model), or a list of pairs",
        )


class DuplicateTargetError(InterspaceError):
    """One tensor was named twice in one pruning call."""

    def __init__(self, tensor_name: str, module: str) -> None:
        super().__init__(
            "Every tensor may be given once, or the count of zeros would not be the count asked for.",
            f"tensor {tensor_name!r} of a {module} is given twice",
            "remove the duplicate; (conv, 'weight') and its coefficients are one tensor",
        )


class NotPrunedError(InterspaceError):
    """`remove` was called for a tensor without a mask."""

    def __init__(self, tensor_name: str, module: str) -> None:
        super().__init__(
            f"Tensor {tensor_name!r} must be pruned before its pruning can be made permanent.",
            f"a {module} without a mask on {tensor_name!r}",
            "call a pruning function first; ip_plugin.masks(model) lists what is pruned",
        )


class OptimizerMismatchError(InterspaceError):
    """An optimizer that trains nothing of the model."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "The optimizer must train parameters of the model.",
            found,
            "pass the optimizer that was built from this model's parameters",
        )


class CompiledModelError(InterspaceError):
    """A compiled or scripted model, whose layers cannot be exchanged."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(
            "A model whose channels are cut must not be compiled: the graph holds the parameters as they were.",
            f"module {name!r} is compiled, a {kind}",
            "prune first and compile then, or pass the model that was compiled (`compiled._orig_mod`)",
        )


class ForeignModuleError(InterspaceError):
    """An argument that names a module of another model."""

    def __init__(self, argument: str, module: object) -> None:
        super().__init__(
            f"Everything in `{argument}` must be a module of the model.",
            f"{module!r}, which is not in `model.modules()`",
            "take modules from the model that is passed, after every copy of it has been made",
        )


class InvalidPrunerError(InterspaceError):
    """Something that is no pruner class of the host."""

    def __init__(self, found: object) -> None:
        super().__init__(
            "A pruner class of torch_pruning (or a subclass, or a partial of one with named arguments) must be given.",
            f"{found!r}",
            "pass for example tp.pruner.BasePruner, and its arguments by name",
        )


class InvalidRatioError(InterspaceError):
    """A ratio of channels outside of [0, 1]."""

    def __init__(self, argument: str, ratio: object) -> None:
        super().__init__(
            f"Ratios in `{argument}` must be numbers in [0, 1].",
            f"{ratio!r} ({type(ratio).__name__})",
            "pass the fraction of the channels that is to go",
        )


class UnfollowedCutError(InterspaceError):
    """A Parameter was cut or changed in a way that masks and optimizer state cannot follow."""

    def __init__(self, tensor: str) -> None:
        super().__init__(
            "Parameters that are lent to a host must be cut by a group of its pruner, and by selection of entries.",
            f"the parameter of {tensor!r} was replaced by something else",
            "cut with group.prune() of a pruner made by ip_plugin.adapters.torch_pruning.pruner",
        )


class ExampleInputError(InterspaceError):
    """The model could not be run on the example input."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "The model must run on `example_input` (a tensor, a tuple of arguments or a dict of keyword arguments).",
            found,
            "pass an input as the model's forward takes it, on the model's device",
        )


class ChangedOutputError(InterspaceError):
    """Cutting masked channels would change what a model computes, or that cannot be told."""


class InvalidStudyError(InterspaceError):
    """A study that cannot be run as asked."""


class ForeignFolderError(InterspaceError):
    """A results folder that does not belong to this study."""

    def __init__(self, folder: object, found: str) -> None:
        super().__init__(
            f"The output folder {str(folder)!r} must be new, empty, or hold results of the same study.",
            found,
            "choose another folder with --output, or remove this one",
        )


class ExperimentError(InterspaceError):
    """An NNI experiment that did not start, or broke off."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "The NNI experiment must run until its last trial has ended.",
            found,
            "run the same command again: what has finished is kept",
        )


class TrialFailedError(InterspaceError):
    """A trial of an NNI experiment, or a run in a process of its own, that ended without a result."""

    def __init__(self, found: str) -> None:
        super().__init__("A run must end with a result.", found, "run the same command again once this is mended")


class PortInUseError(InterspaceError):
    """The port asked for belongs to another process."""

    def __init__(self, port: int) -> None:
        super().__init__(
            "The port of NNI's web portal must be free.",
            f"another process listens on {port}",
            "choose another port with --nni-port, or leave it out and the first free one is taken",
        )


class NoModuleMatchedError(InterspaceError):
    """An entry of an NNI config list that selects nothing."""

    def __init__(self, entry: object, found: str) -> None:
        super().__init__(
            "Every entry of the config list must select a module of the model.",
            f"{found} for {entry!r}",
            "use names and class names of the plain model's `named_modules()`, or remove the entry",
        )


class AlreadyWrappedError(InterspaceError):
    """A model that another pruner of NNI still holds."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            "A model can be in the hands of one NNI pruner at a time.",
            f"wrapped already: {_listed(names)}",
            "call finish(pruner) of ip_plugin.adapters.nni first, or build the new pruner with from_compressor",
        )


class UnadoptedMaskError(InterspaceError):
    """A module that NNI is to prune and that `torch.nn.utils.prune` has pruned."""

    def __init__(self, name: str) -> None:
        super().__init__(
            "Masks of torch.nn.utils.prune must be taken over before NNI prunes, or NNI does not train what they mask.",
            f"module {name!r}: pruned by torch.nn.utils.prune",
            "call ip_plugin.adopt_masks(model) first (for biases: torch.nn.utils.prune.remove)",
        )


class NotAPrunerError(InterspaceError):
    """`finish` was given something that has no model to give back."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "`finish` takes a pruner of NNI that still holds its model.", found, "pass the pruner itself, once"
        )


class NoBatchesError(InterspaceError):
    """A score that needs data, and no data."""

    def __init__(self) -> None:
        super().__init__(
            "At least one batch must be given, a pair (inputs, targets).",
            "an empty iterable (a generator that was used up before?)",
            "pass a list of batches, or a DataLoader",
        )


class TwinMismatchError(InterspaceError):
    """A dense network that is not the one which was pruned."""

    def __init__(self, layer: str, shape: tuple[int, ...], found: str) -> None:
        super().__init__(
            "The dense network must have every prunable layer of the model, in the same shape.",
            f"layer {layer!r} of shape {shape}, and {found} in the dense network",
            "pass a copy of the model from before it was pruned: copy.deepcopy(model)",
        )


class InvalidRidgeError(InterspaceError):
    """A ridge that is none."""

    def __init__(self, ridge: object) -> None:
        super().__init__("`ridge` must be a finite number of at least 0.", f"{ridge!r}", "leave it out, or pass 0.01")


class InvalidBatchError(InterspaceError):
    """A batch that is no pair."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "Every batch must be a pair (inputs, targets).",
            found,
            "pass for example [(images, labels)]; several inputs go into a tuple, named ones into a dict",
        )


class InvalidLossError(InterspaceError):
    """What a loss function returned cannot be differentiated to one gradient."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "`loss(outputs, targets)` must return a finite tensor of one element, computed from the outputs.",
            found,
            "pass for example torch.nn.functional.cross_entropy, and outputs that are not detached",
        )


class InvalidOutputsError(InterspaceError):
    """Outputs of a model that a score cannot be computed from."""

    def __init__(self, score: str, rule: str, found: str) -> None:
        super().__init__(
            f"{score} needs {rule}.", found, "wrap the model so that it returns the logits, or use another score"
        )


class InvalidTemperatureError(InterspaceError):
    """A temperature that outputs cannot be divided by."""

    def __init__(self, temperature: object) -> None:
        super().__init__(
            "`temperature` must be a finite number above zero.", f"{temperature!r}", "leave it out, the default is 200"
        )


class NonFiniteScoresError(InterspaceError):
    """NaN or infinity among scores."""

    def __init__(self, where: str, count: int) -> None:
        super().__init__(
            "Scores must be finite; only -inf is allowed, and means an entry that is pruned already.",
            f"{where}: {count} NaN or infinite scores",
            "score a model that has not diverged, on data and with a loss whose gradients are finite",
        )


class MovementMismatchError(InterspaceError):
    """A saved state of `Movement` that belongs to another model."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "A state of Movement must have one tensor for each prunable layer, of the shape of its coefficients.",
            found,
            "load the state that was saved for this model",
        )


class InvalidScopeError(InterspaceError):
    """A scope that is not known."""

    def __init__(self, scope: object) -> None:
        super().__init__(
            '`scope` must be "global", "layer" or "erk".',
            f"{scope!r}",
            '"global" puts all layers under one threshold, "layer" gives each the same sparsity',
        )


class InvalidFloorError(InterspaceError):
    """A floor that is no count, or that cannot be held."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "`min_per_layer` must be a count of entries that every layer can keep within what is kept in all.",
            found,
            "lower min_per_layer or the sparsity",
        )


class AlreadySparserError(InterspaceError):
    """More entries were to be kept than have not been pruned yet."""

    def __init__(self, keep: int, available: int) -> None:
        super().__init__(
            "Entries that are pruned already (score -inf) stay pruned, so no more than the rest can be kept.",
            f"{keep} entries to keep, {available} that are not pruned",
            "ask for a higher sparsity, or score the model without masks",
        )


class InvalidPatternError(InterspaceError):
    """A pattern that is not understood, or is put together with a sparsity."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "An N:M pattern keeps 1 <= n <= m of every m entries in all layers alike: no other amount or scope.",
            found,
            'pass pattern=NofM(2, 4, along="input") without sparsity, count, scope and min_per_layer',
        )


class PatternMismatchError(InterspaceError):
    """Layers that cannot be divided into groups of m entries."""

    def __init__(self, pattern: str, tensors: Iterable[str]) -> None:
        super().__init__(
            f"The dimension along which {pattern} is to hold must be divisible by m.",
            f"not so in {_listed(tensors)}",
            "leave these out: {where: s for where, s in scores.items() if pattern.fits(s.shape)}",
        )


class UnknownTargetError(InterspaceError):
    """A target that the model does not have."""

    def __init__(self, tensor_name: str, module: str) -> None:
        super().__init__(
            "Everything in `masks` must be a target of the model, one of `ip_plugin.prunable(model)`.",
            f"{tensor_name!r} of a {module} that is no target of this model",
            "compute the scores for this model, after it was copied, converted or baked",
        )


class InvalidScheduleError(InterspaceError):
    """A schedule that makes no sense."""

    def __init__(self, name: str, expected: str, found: object) -> None:
        super().__init__(f"`{name}` of a schedule must be {expected}.", f"{found!r}", f"change {name}")


class InvalidVarietyError(InterspaceError):
    """Scores and filters that do not belong together, a strength or a similarity that is none."""

    def __init__(self, rule: str, found: str) -> None:
        advice = "pass scores (filters,), their kernels (filters, ...), a strength in [0, 1], similarity by one of both"
        super().__init__(rule, found, advice)


class InvalidFileError(InterspaceError):
    """A compact file that is broken, is none, or claims what cannot be."""

    def __init__(self, found: str, remedy: str = "save the model again, or use another copy of the file") -> None:
        super().__init__("A compact file must be whole, and as `ip_plugin.save` writes it.", found, remedy)


class WrongModelError(InvalidFileError):
    """A compact file, and a model that it was not saved from."""

    def __init__(self, found: str) -> None:
        InterspaceError.__init__(
            self,
            "The model must have the architecture of the file: the same tensors, with sizes at least as large.",
            found,
            "build the model as it was built before it was saved; `ip-plugin inspect FILE` shows what is in the file",
        )


class NotStorableError(InterspaceError):
    """Something in a model that a compact file cannot hold."""

    def __init__(self, name: str, found: str, remedy: str) -> None:
        rule = "A compact file holds tensors with values: parameters and buffers."
        super().__init__(rule, f"{name!r}: {found}", remedy)


class StoredDtypeError(InterspaceError):
    """`dtype` of `save` is not understood, or the values do not fit into it."""

    def __init__(self, found: str) -> None:
        super().__init__(
            "`dtype` must be None, torch.float16 or torch.bfloat16, hold the values, and go without `resumable`.",
            found,
            "leave `dtype` out to store the values as they are; bfloat16 reaches as far as float32",
        )


class InvalidResponsesError(InterspaceError):
    """`response_dtype` of `prepare` is not understood."""

    def __init__(self, found: str) -> None:
        rule = "`response_dtype` must be torch.float32 or torch.bfloat16."
        super().__init__(rule, found, "leave it out for results that are exact to float32")
