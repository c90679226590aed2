"""Dynamic sparse training: the network is sparse from the start, and its masks change while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..core.gauge import unit_gauge
from ..core.masking import adopt_masks
from ..core.tensor_ref import TensorRef, prunable_tensors
from ..errors import AmountError
from ..utils.preserved_state import preserved_state
from ..utils.seeds import derived_seed
from ..utils.topk import keep_largest
from ..utils.validation import check_fraction
from .derivatives import check_loss, unwrapped
from .schedules import check_whole, due
from .scores import random
from .selection import Scope, apply_masks, select


class _DynamicSparse:
    """Common to SET and RigL: every few steps the entries of smallest magnitude are dropped, and as many others grown.

    Pruned entries and their optimizer state are zero, so grown ones start at zero. The number of kept entries is fixed.
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
        check_whole(update_every, "update_every", 1)
        check_whole(end_step, "end_step", 1)
        check_fraction(drop_fraction, "drop_fraction")
        self.model, self.optimizer = model, optimizer
        self.update_every, self.end_step, self.drop_fraction = update_every, end_step, drop_fraction
        self.steps = 0
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "dynamic sparse training"))
        self._inner = adopt_masks(unwrapped(model)[0])
        if sparsity is not None:
            apply_masks(
                self._inner, select(random(self._inner, generator=self.generator), sparsity=sparsity, scope=scope)
            )
        elif all(ref.mask is None for ref in prunable_tensors(self._inner)):
            raise AmountError(
                "A model must be sparse to begin with, or `sparsity` must say how sparse it is to be.",
                "sparsity=None, and no layer of the model has a mask",
                "pass sparsity=0.9 for example, or prune the model before",
            )
        for ref in self._sparse():
            assert ref.mask is not None
            self._clear(ref, ~ref.mask)

    @property
    def fraction_now(self) -> float:
        """The share of the kept entries that an update drops: it decays to zero by a cosine until `end_step`."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(1.0, self.steps / self.end_step)))

    def _count_step(self) -> bool:
        """Count a step; returns whether an update is due."""
        self.steps += 1
        return self.steps < self.end_step and due(self.steps, 0, self.end_step, self.update_every)

    def _sparse(self) -> list[TensorRef]:
        """The layers with pruned entries."""
        return [ref for ref in prunable_tensors(self._inner) if ref.mask is not None and not bool(ref.mask.all())]

    @torch.no_grad()
    def _drop_and_grow(self, ref: TensorRef, growth: Tensor) -> None:
        """Drop the entries of smallest magnitude, and grow those with the highest scores of the entries pruned then."""
        mask = None if ref.parametrization is None else ref.parametrization.mask
        assert mask is not None
        count = min(int(self.fraction_now * int(mask.sum())), int((~mask).sum()))
        if not count:
            return
        values = unit_gauge(ref.parameter.detach(), ref.parametrization).flatten()
        kept = mask.flatten().nonzero().squeeze(1)
        dropped = kept[values[kept].abs_().topk(count, largest=False, sorted=False).indices]
        remaining = mask.flatten().index_fill(0, dropped, False)
        (grown,) = keep_largest([growth.flatten().masked_fill(remaining, -math.inf)], count)
        mask.copy_((remaining | grown).reshape(mask.shape))
        self._clear(ref, ~remaining.reshape(mask.shape))

    @torch.no_grad()
    def _clear(self, ref: TensorRef, where: Tensor) -> None:
        """Set entries, their gradients and their optimizer state to zero."""
        coefficients = ref.parameter
        coefficients.masked_fill_(where, 0)
        if coefficients.grad is not None:
            coefficients.grad.masked_fill_(where, 0)
        for value in self.optimizer.state.get(coefficients, {}).values():
            if isinstance(value, Tensor) and value.shape == coefficients.shape:
                value.masked_fill_(where, 0)

    def state_dict(self) -> dict[str, Any]:
        """What is needed to resume, besides the states of model (which includes masks) and optimizer."""
        return {"steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a saved state."""
        self.steps = int(state_dict["steps"])
        self.generator.set_state(state_dict["generator"])


class SET(_DynamicSparse):
    """Sparse evolutionary training: entries to grow are chosen at random (Mocanu et al. 2018, arXiv 1707.04780).

    Call `step` after each ``optimizer.step()``.

    Args:
        model: pruned at random now, if `sparsity` is given. May be wrapped in DistributedDataParallel.
        optimizer: one that trains the model.
        sparsity: of the prunable tensors; None keeps the model's masks.
        end_step: from this step on masks do not change any more.
        update_every: number of steps between two updates.
        drop_fraction: share of the kept entries of each layer that the first update drops; decays to zero by a cosine.
        scope: how the sparsity is distributed over layers, see `select`.
        seed: of the first masks and of the entries to grow.

    Raises:
        AmountError: of `sparsity` or `drop_fraction`; or no sparsity for a model without masks.
        ArgumentError: of the other arguments.

    >>> model = nn.Linear(20, 20)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> schedule = SET(model, optimizer, sparsity=0.9, end_step=1000, update_every=10)
    >>> for _ in range(10):
    ...     _ = schedule.step()
    >>> int(model.parametrizations.weight[0].mask.sum())
    40
    """

    def step(self) -> bool:
        """Count a training step, and update the masks if it is due; returns whether it was."""
        if not self._count_step():
            return False
        for ref in self._sparse():
            noise = torch.rand(ref.parameter.shape, generator=self.generator)
            self._drop_and_grow(ref, noise.to(ref.parameter.device))
        return True


class RigL(_DynamicSparse):
    """Rigging the lottery: entries with the largest gradients grow (Evci et al. 2020, arXiv 1911.11134).

    Call `step` after each ``optimizer.step()``, with a function that computes the loss of the batch::

        rigl.step(lambda: loss(model(x), y))

    The function is called at updates only, without the masks (pruned entries are zero, so the loss is the same): one
    more forward and backward pass. Buffers (BatchNorm statistics), gradients and the random state stay as they are.

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
        """Count a training step, and update the masks if it is due; returns whether it was.

        Args:
            loss: computes the loss of the current batch, without ``backward``.

        Raises:
            BatchError: the loss is not one finite number; nothing has changed.
        """
        if not self._count_step():
            return False
        try:
            gradients = self._dense_gradients(loss)
        except BaseException:
            self.steps -= 1
            raise
        for ref, gradient in gradients:
            self._drop_and_grow(ref, gradient)
        return True

    def _dense_gradients(self, loss: Callable[[], Tensor]) -> list[tuple[TensorRef, Tensor]]:
        """The absolute gradient of every coefficient of every sparse layer, for basis filters of unit norm."""
        refs = self._sparse()
        with preserved_state(self._inner, buffers=True, attributes=True), torch.enable_grad():
            for ref in refs:  # without masks: pruned entries are zero, so the network computes the same
                assert ref.parametrization is not None
                ref.parametrization.mask = None
            self._inner.zero_grad()
            check_loss(loss()).backward()
            gradients = [
                torch.zeros_like(ref.parameter) if ref.parameter.grad is None else ref.parameter.grad for ref in refs
            ]
        if isinstance(self.model, DistributedDataParallel):
            for gradient in gradients:  # bit-identical, or the masks of the processes would drift apart
                dist.broadcast(gradient, 0, group=self.model.process_group)
        return [(ref, _for_unit_norm(ref, gradient).abs_()) for ref, gradient in zip(refs, gradients, strict=True)]


def _for_unit_norm(ref: TensorRef, gradient: Tensor) -> Tensor:
    """The gradient with respect to the coefficients for basis filters of unit norm."""
    norms = None if ref.interspace is None else ref.interspace.filter_norms
    return gradient if norms is None else gradient / norms.reshape(1, 1, *gradient.shape[2:])
