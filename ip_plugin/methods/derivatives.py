"""A model as a function of its prunable tensors: derivatives of a loss, without a trace in the model.

The model is called with detached leaves in the place of its Parameters (`torch.func.functional_call`), so nothing needs
to be put back but attributes and the random state.
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
from ..errors import InvalidBatchError, InvalidLossError, NoBatchesError, NothingToPruneError

#: Called with (outputs, targets); returns a tensor of one element.
Loss: TypeAlias = Callable[[Any, Any], Tensor]
#: Pairs (inputs, targets). Inputs are a tensor, a tuple of arguments, or a mapping of keyword arguments.
Batches: TypeAlias = Iterable[tuple[Any, Any]]


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[TensorRef]]:
    """The model inside of torch's wrappers, and its prunable layers."""
    model = inner(model)
    found = prunable_tensors(model)
    if not found:
        raise NothingToPruneError
    return model, found


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """In what sums over batches are kept: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def first_order(value: Tensor, tensors: list[Tensor]) -> Sequence[Tensor]:
    """The gradient; what `derive` can be asked for."""
    return torch.autograd.grad(value, tensors, materialize_grads=True)


def derive(
    model: nn.Module, batches: Batches, loss: Loss, derivative: Callable[[Tensor, list[Tensor]], Sequence[Tensor]]
) -> tuple[list[TensorRef], list[Tensor]]:
    """The prunable layers, and for each the sum of a derivative over batches (and over processes)."""
    inner, found = unwrapped(model)
    sums: list[Tensor] = []
    with pure(inner):
        leaves, tensors = _leaves(inner, found)
        for number, batch in enumerate(batches):
            inputs, targets = pair(batch)
            value = _checked_loss(loss(call(inner, tensors, inputs), targets))
            derived = derivative(value, leaves)
            del value
            derived = [d.detach().to(sum_dtype(d)) for d in derived]
            if number < 2:  # not in place: a derivative may share memory with something
                sums = [total + d for total, d in zip(sums, derived, strict=True)] if number else derived
            else:
                for total, d in zip(sums, derived, strict=True):
                    total.add_(d)
    if not sums:
        raise NoBatchesError
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            sums = [total.clone(memory_format=torch.contiguous_format) for total in sums]
            for total in sums:
                dist.all_reduce(total, group=wrapper.process_group)
    return found, sums


def pair(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InvalidBatchError(f"a {type(batch).__name__}{length}")
    return batch[0], batch[1]


def call(model: nn.Module, tensors: dict[str, Tensor], inputs: Any) -> Any:
    """The outputs of a model in which these tensors have the place of its own."""
    if isinstance(inputs, Mapping):
        return functional_call(model, tensors, (), dict(inputs))
    return functional_call(model, tensors, inputs if isinstance(inputs, tuple) else (inputs,))


def _checked_loss(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidLossError(f"a {type(value).__name__}")
    if value.numel() != 1:
        raise InvalidLossError(f"a tensor of shape {tuple(value.shape)}")
    if not bool(value.isfinite()):
        raise InvalidLossError(f"a loss of {value.item()}")
    if not value.requires_grad:
        raise InvalidLossError("a loss that does not depend on any prunable tensor")
    return value


def _leaves(model: nn.Module, found: list[TensorRef]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The prunable tensors as leaves of a graph of their own, and all tensors of the model by name.

    Leaves share the Parameters' memory, and nothing but they gets a gradient. Buffers are copies, to be written to.
    """
    leaf_of = {id(each.parameter): each.parameter.detach().requires_grad_() for each in found}
    tensors = {name: leaf_of.get(id(p), p.detach()) for name, p in model.named_parameters()}
    tensors |= {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return list(leaf_of.values()), tensors


@contextmanager
def pure(model: nn.Module) -> Iterator[None]:
    """With gradients on; afterwards the modules' attributes and the random state are as they were.

    A forward pass sets attributes: the hook of `torch.nn.utils.prune` does.
    """
    places = [place for m in model.modules() for place in (vars(m), m._parameters, m._buffers)]
    before = [dict(place) for place in places]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=[each.index for each in devices]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            for module in model.modules():
                if module._compiled_call_impl is not None:
                    module._compiled_call_impl = None
            yield
        finally:
            for place, old in zip(places, before, strict=True):
                if place.keys() != old.keys() or any(place[key] is not value for key, value in old.items()):
                    place.clear()
                    place.update(old)
