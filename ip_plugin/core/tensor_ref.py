"""`TensorRef`, the record of one tensor of a model, and the functions that list the tensors of a model."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..errors import ConversionError, SelectionError, listed
from . import torch_masks
from .parametrization import Interspace, Mask, adapt_loading, enter, parametrizations

Model = TypeVar("Model", bound=nn.Module)
#: A (module, tensor name) pair, as `torch.nn.utils.prune` takes it.
Target: TypeAlias = tuple[nn.Module, str]


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a model, by the name that it has in the plain model.

    Everything else is looked up when it is asked for, so a reference stays valid when the tensor is parametrized,
    masked or baked.

    Attributes:
        module: the module that holds the tensor. Torch's `ParametrizationList` with the name ``"original"`` works too:
            ``TensorRef(*target)``.
        tensor_name: name of the Parameter or buffer in `module`.
        module_name: name of `module` in the model; empty where it does not matter.

    >>> from ip_plugin import interspace
    >>> ref = TensorRef(interspace(nn.Conv2d(3, 8, 3)))
    >>> ref.interspace, ref.parameter.shape, ref.mask
    (Interspace(kernel=3x3, basis=9 filters, constraint=unit), torch.Size([8, 3, 3, 3]), None)
    """

    module: nn.Module
    tensor_name: str = "weight"
    module_name: str = ""

    @property
    def name(self) -> str:
        """The key of the tensor in the ``state_dict`` of the plain model."""
        return f"{self.module_name}.{self.tensor_name}" if self.module_name else self.tensor_name

    @property
    def chain(self) -> ParametrizationList | None:
        """Torch's list of the tensor's parametrizations if the first of them is ours, or None."""
        chain = self.module
        if not isinstance(chain, ParametrizationList) and is_parametrized(chain, self.tensor_name):
            chain = parametrizations(chain)[self.tensor_name]
        first = next(chain.children(), None) if isinstance(chain, ParametrizationList) else None
        return chain if isinstance(first, Mask) else None  # type: ignore[return-value]

    @property
    def parametrization(self) -> Mask | None:
        """Our parametrization of the tensor, or None."""
        chain = self.chain
        return None if chain is None else chain[0]  # type: ignore[return-value]

    @property
    def interspace(self) -> Interspace | None:
        """Our parametrization if the tensor is in the interspace, or None if it is spatial."""
        parametrization = self.parametrization
        return parametrization if isinstance(parametrization, Interspace) else None

    @property
    def target(self) -> Target:
        """The pair that a pruner acts on: the tensor itself, or `original` behind our parametrization."""
        chain = self.chain
        return (self.module, self.tensor_name) if chain is None else (chain, "original")

    @property
    def parameter(self) -> nn.Parameter:
        """The trained Parameter, without any mask: coefficients, or a spatial tensor. Of a buffer, the buffer."""
        return torch_masks.parameter(*self.target)

    @property
    def composed(self) -> Tensor:
        """The tensor that the module computes with: masked, and composed in the interspace; without a gradient."""
        chain = self.chain
        composed: Tensor = getattr(self.module, self.tensor_name) if chain is None else chain()
        return composed.detach()

    @property
    def mask(self) -> Tensor | None:
        """A copy of what our mask and that of `torch.nn.utils.prune` keep together; None if there is neither."""
        ours = None if self.parametrization is None else self.parametrization.kept
        theirs = torch_masks.mask(*self.target)
        if ours is None or theirs is None:
            return theirs if ours is None else ours.clone()
        return ours & theirs

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer, not a Parameter."""
        return self.tensor_name in self.module._buffers

    @property
    def is_foreign(self) -> bool:
        """Whether it lies behind someone else's parametrization."""
        return isinstance(self.module, ParametrizationList) and self.chain is None

    @property
    def is_prunable(self) -> bool:
        """Whether it is the weight of a convolution or linear layer, and a Parameter that can be pruned."""
        if self.tensor_name != "weight" or not isinstance(self.module, (_ConvNd, nn.Linear)):
            return False
        module, tensor_name = self.target
        if module is self.module and is_parametrized(module, tensor_name):
            return False  # by someone else
        if tensor_name in torch_masks.pruned_names(module):
            return True
        parameter = getattr(module, tensor_name, None)
        return isinstance(parameter, nn.Parameter) and not isinstance(parameter, nn.parameter.UninitializedParameter)

    def set_mask(self, mask: Tensor | None) -> None:
        """Make `mask` our mask of the tensor, instead of every mask there was; None keeps everything.

        A tensor without a parametrization of ours gets one.
        """
        torch_masks.take_off(*self.target)
        if self.chain is None:
            enter(self.module, self.tensor_name, Mask())
        assert self.parametrization is not None
        self.parametrization.set_mask(mask, self.parameter)

    def add_mask(self, kept: Tensor) -> None:
        """Prune the entries where `kept` is False, too; a tensor of which nothing is pruned gets no mask."""
        before = self.mask
        if before is not None or not bool(kept.all()):
            self.set_mask(kept if before is None else kept & before)


def described(target: Target, like: Tensor) -> str:
    """A target in words, where the layer's name is not known: ``weight of shape (10, 32)``."""
    module, what = target
    if isinstance(module, ParametrizationList):
        what = "coefficients" if isinstance(module[0], Interspace) else "weight"
    return f"{what} of shape {tuple(like.shape)}"


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ConversionError if a weight of the layer `name` has NaN or infinite values."""
    bad = weight.numel() - int(weight.detach().isfinite().sum())
    if bad:
        raise ConversionError(
            "Weights must be finite to be written in a basis.",
            f"layer {name!r}: {bad} NaN or infinite values",
            "take a model that has not diverged",
        )


def check_no_other(refs: Iterable[TensorRef]) -> None:
    """Raise ConversionError if someone else's parametrization sits on top of one of ours."""
    for ref in refs:
        others = list(ref.chain or ())[1:]
        if others:
            raise parametrized_by_another(
                ref.module_name,
                ", ".join(type(other).__name__ for other in others) + ", besides that of ip_plugin",
                "bake the model first and add the other parametrization afterwards; to rescue a trained model, copy "
                "`layer.weight` into a plain model (torch's remove_parametrizations would damage the layer)",
                ref.tensor_name,
            )


def check_not_sharded(model: nn.Module) -> None:
    """Raise ConversionError if `fully_shard` or tensor parallelism has distributed the parameters of a model."""
    distributed = sys.modules.get("torch.distributed.tensor")  # if it was not imported, nothing is distributed
    if distributed is None:
        return
    for name, module in model.named_modules():
        sharded = any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)  # its place differs with versions
        if sharded or any(isinstance(parameter, distributed.DTensor) for parameter in module._parameters.values()):
            raise ConversionError(
                "A model must be converted, pruned, saved and baked where its parameters are whole.",
                f"module {name!r} has parameters that are distributed over processes, as by fully_shard",
                "convert and prune the model before it is sharded; afterwards load its full state dict "
                "(`get_model_state_dict` of torch.distributed.checkpoint.state_dict with "
                "`StateDictOptions(full_state_dict=True)`) into a model that is not sharded",
            )


def parametrized_by_another(
    layer: str,
    parametrization: str,
    remedy: str = "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first, or leave the layer "
    "out",
    tensor_name: str = "weight",
) -> ConversionError:
    """The error for a tensor that someone else has parametrized."""
    return ConversionError(
        "The weight of a layer must not be parametrized by someone else.",
        f"layer {layer!r}: {tensor_name} parametrized by {parametrization}",
        remedy,
    )


def unknown_layer(name: str, known: Iterable[str], argument: str = "layers", kind: str = "module") -> SelectionError:
    """The error for the name of a module (or of one of another kind) that is not there; it suggests similar names."""
    names = [known_name for known_name in known if known_name]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return SelectionError(
        f"Every name in `{argument}` must be the name of a {kind} of the model.",
        f"no {kind} {name!r}",
        f"use names from `model.named_modules()`; the closest are {listed(close)}",
    )


def inner(model: nn.Module) -> nn.Module:
    """The model inside of torch's wrappers: DistributedDataParallel, DataParallel, torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        else:
            return model


def own_tensors(module: nn.Module, module_name: str = "") -> Iterator[TensorRef]:
    """The tensors of a module, without those of its children: Parameters, then persistent buffers.

    They are those of the plain model: parts of our parametrizations and masks are left out.
    """
    if isinstance(module, Mask) or TensorRef(module, "original").chain is not None:
        return
    pruned = torch_masks.pruned_names(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            plain = name.removesuffix("_orig")
            yield TensorRef(module, plain if plain in pruned else name, module_name)
    if is_parametrized(module):
        refs = (TensorRef(module, name, module_name) for name in parametrizations(module))
        yield from (ref for ref in refs if ref.chain is not None)
    for name, buffer in module._buffers.items():
        is_mask = name.endswith("_mask") and name.removesuffix("_mask") in pruned
        if buffer is not None and not is_mask and name not in module._non_persistent_buffers_set:
            yield TensorRef(module, name, module_name)


def tensors_of(model: nn.Module) -> list[TensorRef]:
    """Every tensor that the ``state_dict`` of the plain model holds, in model order; tied ones once for each name."""
    return [ref for name, module in model.named_modules() for ref in own_tensors(module, name)]


def prunable_tensors(model: nn.Module) -> list[TensorRef]:
    """The weights of convolutions and linear layers that can be pruned, in model order, each tied weight once."""
    refs: dict[int, TensorRef] = {}
    for ref in tensors_of(model):
        if ref.is_prunable:
            refs.setdefault(id(ref.parameter), ref)
    return list(refs.values())


def add_masks(model: nn.Module) -> None:
    """Give every tensor that can be pruned a mask, so that pruning does not change the keys of the ``state_dict``.

    Tied weights get theirs when they are pruned: a parametrization would be one more name of the Parameter.
    """
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for ref in prunable_tensors(model):
        if ref.chain is None and owners[id(ref.parameter)] == 1 and torch_masks.mask(*ref.target) is None:
            enter(ref.module, ref.tensor_name, Mask())
        elif ref.chain is None:
            adapt_loading(ref.module)


def parametrized_tensors(model: nn.Module) -> list[TensorRef]:
    """The tensors under a parametrization of this package, in model order."""
    return [ref for ref in tensors_of(model) if ref.chain is not None]


def by_basis(refs: Iterable[TensorRef]) -> dict[nn.Parameter, list[TensorRef]]:
    """Of some tensors those in the interspace: {basis: the tensors that share it}."""
    groups: dict[nn.Parameter, list[TensorRef]] = {}
    for ref in refs:
        if ref.interspace is not None:
            groups.setdefault(ref.interspace.basis, []).append(ref)
    return groups
