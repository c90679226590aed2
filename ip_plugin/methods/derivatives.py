"""Derivatives of a loss with respect to the prunable tensors of a model, which stays as it is.

The model is called with detached leaves instead of its Parameters (`torch.func.functional_call`), so only attributes
and the random state have to be restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from ..core.tensor_ref import TensorRef, inner, prunable_tensors
from ..errors import BatchError, SelectionError
from ..utils.preserved_state import preserved_state

#: Called with (outputs, targets); returns a tensor of one element.
Loss: TypeAlias = Callable[[Any, Any], Tensor]
#: Pairs (inputs, targets). Inputs are a tensor, a tuple of arguments, or a mapping of keyword arguments.
Batches: TypeAlias = Iterable[tuple[Any, Any]]


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[TensorRef]]:
    """The model inside of torch's wrappers, and its prunable layers; raises SelectionError if it has none."""
    model = inner(model)
    refs = prunable_tensors(model)
    if not refs:
        raise SelectionError(
            "The model must have a convolution or linear layer that can be pruned.",
            f"none in a {type(model).__name__}",
            "pass a model that `ip_plugin.prunable(model)` finds something in",
        )
    return model, refs


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums over batches: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def first_order(value: Tensor, tensors: list[Tensor]) -> Sequence[Tensor]:
    """The gradient, as a `derivative` of `derive`."""
    return torch.autograd.grad(value, tensors, materialize_grads=True)


def derive(
    model: nn.Module, batches: Batches, loss: Loss, derivative: Callable[[Tensor, list[Tensor]], Sequence[Tensor]]
) -> tuple[list[TensorRef], list[Tensor]]:
    """The prunable layers, and for each the sum of a derivative over batches (and over processes)."""
    inner, refs = unwrapped(model)
    sums: list[Tensor] = []
    with pure(inner):
        # Leaves share the memory of the Parameters; only they get gradients. Buffers are copies, which may be changed.
        leaf_of = {id(ref.parameter): ref.parameter.detach().requires_grad_() for ref in refs}
        tensors = {name: leaf_of.get(id(p), p.detach()) for name, p in inner.named_parameters()}
        tensors |= {name: buffer.detach().clone() for name, buffer in inner.named_buffers()}
        for inputs, targets in pairs(batches):
            value = check_loss(loss(call(inner, tensors, inputs), targets))
            derived = derivative(value, list(leaf_of.values()))
            del value
            derived = [d.detach().to(sum_dtype(d)) for d in derived]
            # Not in place: a derivative may share memory with something.
            sums = [total + d for total, d in zip(sums, derived, strict=True)] if sums else derived
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            sums = [total.clone(memory_format=torch.contiguous_format) for total in sums]
            for total in sums:
                dist.all_reduce(total, group=wrapper.process_group)
    return refs, sums


def pairs(batches: Batches) -> Iterator[tuple[Any, Any]]:
    """The inputs and the targets of every batch; raises BatchError if there is none, or one is not a pair."""
    empty = True
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise BatchError(
                "Every batch must be a pair (inputs, targets).",
                f"a {type(batch).__name__}{length}",
                "pass for example [(images, labels)]; several inputs go into a tuple, named ones into a dict",
            )
        empty = False
        yield batch[0], batch[1]
    if empty:
        raise BatchError(
            "At least one batch must be given, a pair (inputs, targets).",
            "an empty iterable (a generator that was used up before?)",
            "pass a list of batches, or a DataLoader",
        )


def call(model: nn.Module, tensors: dict[str, Tensor], inputs: Any) -> Any:
    """The outputs of a model with these tensors instead of its own."""
    if isinstance(inputs, Mapping):
        return functional_call(model, tensors, (), dict(inputs))
    return functional_call(model, tensors, inputs if isinstance(inputs, tuple) else (inputs,))


def check_loss(value: object) -> Tensor:
    """The value of a loss function; raises BatchError unless it is one finite number that can be differentiated."""
    if not isinstance(value, Tensor):
        problem = f"a {type(value).__name__}"
    elif value.numel() != 1:
        problem = f"a tensor of shape {tuple(value.shape)}"
    elif not bool(value.isfinite()):
        problem = f"a loss of {value.item()}"
    elif not value.requires_grad:
        problem = "a loss that does not depend on any prunable tensor"
    else:
        return value
    raise BatchError(
        "The loss must be a finite tensor of one element, computed from the model's outputs.",
        problem,
        "pass for example torch.nn.functional.cross_entropy, and outputs that are not detached",
    )


@contextmanager
def pure(model: nn.Module) -> Iterator[None]:
    """`preserved_state` with attributes, which forward passes may set; gradients are on, and compiled calls off."""
    with preserved_state(model, attributes=True), torch.inference_mode(False), torch.enable_grad():
        for module in model.modules():
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None
        yield
