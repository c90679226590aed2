"""Dynamic sparse training: a network that is sparse from the start, and moves its non-zeros while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..core.gauge import unit_gauge
from ..core.masking import adopt_masks
from ..core.parametrization import Interspace
from ..core.tensor_ref import TensorRef, prunable_tensors
from ..errors import InvalidAmountError, InvalidLossError, InvalidScheduleError
from ..utils.seeds import derived_seed
from ..utils.topk import keep_largest
from ..utils.validation import is_fraction
from .derivatives import unwrapped
from .schedules import due, whole
from .scores import random
from .selection import Scope, apply_masks, select


class _DynamicSparse:
    """What SET and RigL have in common: every so many steps the weakest entries go, and as many others come.

    Entries that are pruned are zero, and so is the optimizer's state of them; entries that come start at zero, and
    count as much as those that go, so that the number of non-zeros never changes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float | None = None,
        end_step: int,
        update_every: int = 100,
        drop_fraction: float = 0.3,
        scope: Scope = "erk",
        seed: int = 0,
    ) -> None:
        whole(update_every, "update_every", 1)
        whole(end_step, "end_step", 1)
        if not is_fraction(drop_fraction):
            raise InvalidScheduleError("drop_fraction", "a number in [0, 1]", drop_fraction)
        self.model, self.optimizer = model, optimizer
        self.update_every, self.end_step, self.drop_fraction = update_every, end_step, drop_fraction
        self.steps = 0
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "dynamic sparse training"))
        self._inner = adopt_masks(unwrapped(model)[0])
        if sparsity is not None:
            apply_masks(
                self._inner, select(random(self._inner, generator=self.generator), sparsity=sparsity, scope=scope)
            )
        elif all(layer.mask is None for layer in prunable_tensors(self._inner)):
            raise InvalidAmountError(
                "A model must be sparse to begin with, or `sparsity` must say how sparse it is to be.",
                "sparsity=None, and no layer of the model has a mask",
                "pass sparsity=0.9 for example, or prune the model before",
            )
        for layer in self._sparse():
            assert layer.mask is not None
            self._clear(layer, ~layer.mask)

    @property
    def fraction_now(self) -> float:
        """The share of what is kept that an update moves: it falls to zero by a cosine until `end_step`."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(1.0, self.steps / self.end_step)))

    def _count_step(self) -> bool:
        """Count a step; whether an update is due."""
        self.steps += 1
        return self.steps < self.end_step and due(self.steps, 0, self.end_step, self.update_every)

    def _sparse(self) -> list[TensorRef]:
        """The layers of which something is pruned."""
        return [
            layer for layer in prunable_tensors(self._inner) if layer.mask is not None and not bool(layer.mask.all())
        ]

    @torch.no_grad()
    def _move(self, layer: TensorRef, growth: Tensor) -> None:
        """Drop the weakest entries of a layer, and let those of the largest growth come.

        Args:
            layer: it has a mask of ours.
            growth: scores of all entries; only those of entries that are pruned after the drop are read.
        """
        assert layer.parametrization is not None
        mask = layer.parametrization.mask
        assert mask is not None
        count = min(int(self.fraction_now * int(mask.sum())), int((~mask).sum()))
        if not count:
            return
        strength = unit_gauge(layer.parameter.detach(), layer.parametrization).flatten()
        stays = mask.flatten()
        kept = stays.nonzero().squeeze(1)
        stays = stays.index_fill(0, kept[strength[kept].abs_().topk(count, largest=False, sorted=False).indices], False)
        (grown,) = keep_largest([growth.flatten().masked_fill(stays, -math.inf)], count)
        mask.copy_((stays | grown).reshape(mask.shape))
        stays = stays.reshape(mask.shape)
        self._clear(layer, ~stays)

    @torch.no_grad()
    def _clear(self, layer: TensorRef, where: Tensor) -> None:
        """Zero entries, and the optimizer's state of them."""
        coefficients = layer.parameter
        coefficients.masked_fill_(where, 0)
        if coefficients.grad is not None:
            coefficients.grad.masked_fill_(where, 0)
        for value in self.optimizer.state.get(coefficients, {}).values():
            if isinstance(value, Tensor) and value.shape == coefficients.shape:
                value.masked_fill_(where, 0)

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed needs besides the states of model (masks included) and optimizer."""
        return {"steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.steps = int(state_dict["steps"])
        self.generator.set_state(state_dict["generator"])


class SET(_DynamicSparse):
    """Sparse evolutionary training: what comes is chosen at random (Mocanu et al. 2018, arXiv 1707.04780).

    Call `step` after each ``optimizer.step()``.

    Args:
        model: pruned at random to begin with; or sparse already. May be wrapped in DistributedDataParallel.
        optimizer: one that trains the model.
        sparsity: of the prunable tensors; None keeps the masks that there are.
        end_step: the step from which nothing moves any more.
        update_every: how many steps lie between two updates.
        drop_fraction: share of what a layer keeps that the first update moves; falls to zero by a cosine.
        scope: how the sparsity is distributed over layers, see `select`.
        seed: of the first masks and of what comes.

    Raises:
        InvalidAmountError, InvalidScheduleError

    >>> model = nn.Linear(20, 20)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> schedule = SET(model, optimizer, sparsity=0.9, end_step=1000, update_every=10)
    >>> for _ in range(10):
    ...     _ = schedule.step()
    >>> int(model.parametrizations.weight[0].mask.sum())
    40
    """

    def step(self) -> bool:
        """Count a step of training, and move entries if it is time; returns whether masks have changed."""
        if not self._count_step():
            return False
        for layer in self._sparse():
            noise = torch.rand(layer.parameter.shape, generator=self.generator)
            self._move(layer, noise.to(layer.parameter.device))
        return True


class RigL(_DynamicSparse):
    """Rigging the lottery: what comes has the largest gradients (Evci et al. 2020, arXiv 1911.11134).

    Call `step` after each ``optimizer.step()``, with a function that computes the loss of the batch::

        rigl.step(lambda: loss(model(x), y))

    It is called at updates only, with the masks lifted: one forward and backward pass more. Buffers (BatchNorm
    statistics), gradients and the random state are then as they were.

    Args: as `SET`; `end_step` is commonly three quarters of the training.

    >>> model = nn.Linear(20, 20)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> schedule = RigL(model, optimizer, sparsity=0.9, end_step=1000, update_every=10)
    >>> x = torch.randn(8, 20)
    >>> for _ in range(10):
    ...     _ = schedule.step(lambda: model(x).square().sum())
    >>> int(model.parametrizations.weight[0].mask.sum())
    40
    """

    def step(self, loss: Callable[[], Tensor]) -> bool:
        """Count a step of training, and move entries if it is time; returns whether masks have changed.

        Args:
            loss: computes the loss of the present batch, without ``backward``.

        Raises:
            InvalidLossError: not one finite number; nothing has moved.
        """
        if not self._count_step():
            return False
        try:
            gradients = self._dense_gradients(loss)
        except BaseException:
            self.steps -= 1
            raise
        for layer, gradient in gradients:
            self._move(layer, gradient)
        return True

    def _dense_gradients(self, loss: Callable[[], Tensor]) -> list[tuple[TensorRef, Tensor]]:
        """For every sparse layer the size of the gradient of every coefficient in unit gauge, pruned ones included."""
        found = self._sparse()
        with _untouched(self._inner), _lifted(found), torch.enable_grad():
            value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite()):
                raise InvalidLossError(f"{value!r}")
            value.backward()
            gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (each.parameter for each in found)]
        if isinstance(self.model, DistributedDataParallel):
            for gradient in gradients:  # equal to the last bit, or the masks would drift apart
                dist.broadcast(gradient, 0, group=self.model.process_group)
        return [
            (layer, _per_unit_norm(layer, gradient).abs_()) for layer, gradient in zip(found, gradients, strict=True)
        ]


def _per_unit_norm(layer: TensorRef, gradient: Tensor) -> Tensor:
    """The gradient of coefficients as they are in unit gauge."""
    if not isinstance(layer.parametrization, Interspace):
        return gradient
    ones = torch.ones((1, 1, *gradient.shape[2:]), dtype=gradient.dtype, device=gradient.device)
    return gradient / unit_gauge(ones, layer.parametrization)


@contextmanager
def _lifted(found: list[TensorRef]) -> Iterator[None]:
    """Without masks for a while: what is pruned is zero, so that the network computes the same."""
    parametrizations = [layer.parametrization for layer in found]
    masks = [None if each is None else each.mask for each in parametrizations]
    try:
        for each in parametrizations:
            if each is not None:
                each.mask = None
        yield
    finally:
        for each, mask in zip(parametrizations, masks, strict=True):
            if each is not None:
                each.mask = mask


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Gradients begin at None; afterwards they, the buffers and the random state are as they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.dtype is not torch.bool]
    devices = {p.device.index for p, _ in gradients if p.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    with torch.random.fork_rng(devices=[each for each in devices if each is not None]):
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
