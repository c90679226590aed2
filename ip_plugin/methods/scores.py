"""Importance scores of every prunable entry of a model; entries with the highest scores are kept.

Scores are a dict with one tensor for each target of ``ip_plugin.prunable(model)``, of the target's shape, contiguous.
In the interspace they rate coefficients; scores that depend on the filter scale use the coefficients that belong to
basis filters of unit norm. Entries that are pruned already, by our mask or by that of `torch.nn.utils.prune`, have the
score -inf; all others are finite.

The functions are pure: parameters, buffers (BatchNorm statistics), gradients, modes and the random state of torch are
afterwards as they were, also if a function fails. The model runs in the mode that it is in, uncompiled. A model that is
wrapped in DistributedDataParallel gets the same scores in every process: gradients are summed over the processes.

Scores can be passed to `torch.nn.utils.prune` as ``importance_scores``. That library ranks by absolute value; `grasp`
and `movement` have signs, so pass their `ranks`.

>>> from torch.nn.utils import prune
>>> from ip_plugin import interspace, prunable
>>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)))
>>> batches = [(torch.rand(4, 3, 3, 3), torch.tensor([0, 1, 1, 0]))]
>>> scores = ranks(grasp(model, batches, nn.functional.cross_entropy))
>>> prune.global_unstructured(prunable(model), prune.L1Unstructured, importance_scores=scores, amount=0.9)
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from ..core.gauge import unit_gauge
from ..core.parametrization import Interspace
from ..core.tensor_ref import Target, TensorRef, prunable_tensors
from ..errors import ArgumentError, BatchError, CheckpointError, ScoreError, SelectionError, listed
from ..utils.example_input import run
from .derivatives import Batches, Loss, derive, first_order, pure, sum_dtype, unwrapped

Scores: TypeAlias = dict[Target, Tensor]


def random(model: nn.Module, *, generator: torch.Generator) -> Scores:
    """Uniform noise in [0, 1).

    Args:
        model: not changed.
        generator: source of the noise; a CPU generator gives the same noise for models on any device. Its seed must not
            be the one that initialised the weights: the noise would be a function of them.

    Raises:
        SelectionError: the model has no prunable layer.

    >>> [score.shape for score in random(nn.Linear(3, 2), generator=torch.Generator()).values()]
    [torch.Size([2, 3])]
    """
    _, refs = unwrapped(model)
    noise = (torch.rand(ref.parameter.shape, generator=generator, device=generator.device) for ref in refs)
    return _scores(refs, [n.to(ref.parameter.device) for n, ref in zip(noise, refs, strict=True)])


@torch.no_grad()
def magnitude(model: nn.Module) -> Scores:
    """``abs(t)`` for basis filters of unit norm (Han et al. 2015, arXiv 1506.02626).

    Args:
        model: not changed.

    Raises:
        SelectionError: the model has no prunable layer.
        ScoreError: NaN or infinity in the model.
    """
    _, refs = unwrapped(model)
    return _scores(refs, [unit_gauge(ref.parameter.detach(), ref.parametrization).abs() for ref in refs])


@torch.no_grad()
def lamp(model: nn.Module) -> Scores:
    """``t^2`` over the sum of ``t^2`` of the entries of the layer that are at least as large, for filters of unit norm.

    After Lee et al. 2021 (arXiv 2010.07611). Pruned entries are in no sum. The largest entry of every layer has the
    score 1 (if no other is as large), so that pruning by one global threshold keeps some of each layer.

    Args:
        model: not changed.

    Raises:
        SelectionError: the model has no prunable layer.
        ScoreError: NaN or infinity in the model.

    >>> model = nn.Linear(3, 1)
    >>> model.weight.data = torch.tensor([[1.0, -3.0, 2.0]])
    >>> [score] = lamp(model).values()
    >>> score * 182
    tensor([[ 13., 182.,  56.]], dtype=torch.float64)
    """
    _, refs = unwrapped(model)
    return _scores(refs, [_lamp(ref) for ref in refs])


def _lamp(ref: TensorRef) -> Tensor:
    magnitudes = unit_gauge(ref.parameter.detach(), ref.parametrization).abs()
    if ref.mask is not None:
        magnitudes = magnitudes * ref.mask
    ascending, order = magnitudes.flatten().sort()
    squares = ascending.double().square()
    sums = squares.flip(0).cumsum(0).flip(0)
    # Equal entries share the sum that begins at the first of them.
    repeated = torch.zeros_like(squares, dtype=torch.bool)
    repeated[1:] = ascending[1:] == ascending[:-1]
    first = torch.arange(len(squares), device=squares.device).masked_fill_(repeated, 0).cummax(0).values
    scores = torch.where(squares == 0, squares, squares / sums[first])
    return torch.empty_like(scores).scatter_(0, order, scores).reshape(magnitudes.shape)


def snip(model: nn.Module, batches: Batches, loss: Loss) -> Scores:
    """``abs(t * dL/dt)``, the gradients summed over the batches (Lee et al. 2019, arXiv 1810.02340).

    Args:
        model: not changed; run in the mode that it is in.
        batches: pairs (inputs, targets), on the model's device.
        loss: called with (outputs, targets).

    Raises:
        SelectionError: the model has no prunable layer.
        BatchError: no batches, or one that is no pair; a loss that is not one finite number, or depends on no layer.
        ScoreError: NaN or infinity among the gradients.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[3.0, -1.0]])
    >>> [score] = snip(model, [(torch.tensor([[2.0, 5.0]]), None)], lambda outputs, _: outputs.sum()).values()
    >>> score
    tensor([[6., 5.]])
    """
    refs, gradients = derive(model, batches, loss, first_order)
    return _scores(refs, [(g * ref.parameter.detach()).abs_() for ref, g in zip(refs, gradients, strict=True)])


def movement(model: nn.Module, batches: Batches, loss: Loss) -> Scores:
    """``-t * dL/dt``, summed over the batches (Sanh et al. 2020, arXiv 2005.07683), without training in between.

    Positive where a step of gradient descent moves an entry away from zero. `Movement` sums it over a training run.

    Args, raises: as `snip`.
    """
    refs, gradients = derive(model, batches, loss, first_order)
    return _scores(refs, [(g * ref.parameter.detach()).neg_() for ref, g in zip(refs, gradients, strict=True)])


def grasp(model: nn.Module, batches: Batches, loss: Loss, temperature: float = 200) -> Scores:
    """``t * (H v)``: `v` the gradient and `H` the Hessian over the prunable tensors, summed over the batches.

    After Wang et al. 2020 (arXiv 2002.07376), who remove the largest ``-t * (H v)``: the same order. `t`, `H` and `v`
    are those for basis filters of unit norm. Dropout is the same in both derivatives.

    Args:
        model: not changed; run in the mode that it is in. Its output must be one tensor, the logits.
        batches: pairs (inputs, targets), on the model's device; all are held in memory, as they are used twice.
        loss: called with (outputs / temperature, targets).
        temperature: outputs are divided by it.

    Raises:
        As `snip`, and
        BatchError: the model's output is not one tensor.
        ArgumentError: the temperature is not a finite number above zero.
    """
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise ArgumentError(
            "`temperature` must be a finite number above zero.", f"{temperature!r}", "leave it out, the default is 200"
        )

    def cooled(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise BatchError(
                "The model's output must be one tensor, the logits, which GraSP divides by the temperature.",
                f"a {type(outputs).__name__}",
                "wrap the model so that it returns the logits, or use another score",
            )
        return loss(outputs / temperature, targets)

    kept = list(batches)
    refs, gradient = derive(model, kept, cooled, first_order)
    with torch.inference_mode(False):
        directions = [_over_squared_norms(ref, g) for ref, g in zip(refs, gradient, strict=True)]

    def product_with_hessian(value: Tensor, tensors: list[Tensor]) -> Sequence[Tensor]:
        gradients = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
        along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        assert isinstance(along, Tensor)
        if not along.requires_grad:  # the loss is linear
            return [torch.zeros_like(t) for t in tensors]
        return torch.autograd.grad(along, tensors, materialize_grads=True)

    refs, products = derive(model, kept, cooled, product_with_hessian)
    return _scores(refs, [p * ref.parameter.detach() for ref, p in zip(refs, products, strict=True)])


def _over_squared_norms(ref: TensorRef, gradient: Tensor) -> Tensor:
    """Divided twice by the filter norms: once for the gradient, once for the Hessian that is applied to it."""
    norms = None if ref.interspace is None else ref.interspace.filter_norms
    if norms is None:
        return gradient
    norms = norms.reshape(1, 1, *gradient.shape[2:])
    # The gradient of a coefficient whose filter is zero is zero; so is its score.
    return gradient * torch.where(norms > 0, norms.square().reciprocal(), 0.0)


def synflow(model: nn.Module, example_input: Any) -> Scores:
    """``abs(t * dR/dt)``: the synaptic flow through every entry, without data.

    After Tanaka et al. 2020 (arXiv 2006.05467). `R` is the sum of the outputs in evaluation mode, for an input of ones,
    with the absolute values of all parameters (coefficients and bases too). Running means are taken as zero: they
    belong to the network with signs, and would switch off activations. Computed and returned in float64, because the
    flow through a deep network leaves the range of float32.

    Meant for many rounds, each of which prunes a little: see `prune` with ``rounds=100``.

    Args:
        model: not changed.
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes matter. Tensors
            that are not floating point (token ids) are used as they are.

    Raises:
        SelectionError: the model has no prunable layer.
        BatchError: the model does not run on the input, or no floating point output depends on the prunable tensors.
        ScoreError: NaN or infinity in the model, or a flow out of the range of float64.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> model[0].weight.data = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    >>> model[1].weight.data = torch.tensor([[-2.0, 1.0]])
    >>> for score in synflow(model, torch.zeros(1, 2)).values():
    ...     print(score.tolist())
    [[2.0, 4.0], [0.0, 3.0]]
    [[6.0, 3.0]]
    """
    inner, refs = unwrapped(model)
    means = {id(module.running_mean) for module in inner.modules() if isinstance(module, _NormBase)}
    with pure(inner):
        tensors = {name: _wide(p.detach().abs()) for name, p in inner.named_parameters()}
        for name, buffer in inner.named_buffers():
            tensors[name] = _wide(torch.zeros_like(buffer) if id(buffer) in means else buffer.detach().clone())
        name_of = {id(p): name for name, p in inner.named_parameters()}
        for space in inner.modules():
            if isinstance(space, Interspace):  # the signs that count are those of the effective basis
                tensors[name_of[id(space.basis)]] = _wide(space.effective_basis.detach().abs())
                space.constraint = "none"
        leaves = [tensors[name_of[id(ref.parameter)]].requires_grad_() for ref in refs]
        outputs = run(_Substituted(inner, tensors), _ones(example_input))
        flow = sum(output.double().sum() for output in _leaves(outputs) if output.is_floating_point())
        if not isinstance(flow, Tensor) or not flow.requires_grad:
            raise BatchError(
                "SynFlow needs a floating point output that depends on the prunable tensors.",
                f"a {type(outputs).__name__}",
                "wrap the model so that it returns the logits, or use another score",
            )
        gradients = torch.autograd.grad(flow, leaves, materialize_grads=True)
    return _scores(refs, [(t.detach() * g).abs_() for t, g in zip(leaves, gradients, strict=True)])


class _Substituted(nn.Module):
    """A model called with other tensors instead of its own, with gradients even where they are switched off."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.tensors = tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return functional_call(self.model, self.tensors, args, kwargs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _ones(example: Any) -> Any:
    if isinstance(example, Tensor):
        return torch.ones_like(example, dtype=torch.float64) if example.is_floating_point() else example
    if isinstance(example, Mapping):
        return {name: _ones(value) for name, value in example.items()}
    return tuple(_ones(value) for value in example) if isinstance(example, tuple) else example


def _leaves(outputs: Any) -> list[Tensor]:
    """The tensors in nested mappings, lists and tuples (torch's pytree knows registered mappings only)."""
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [leaf for value in outputs for leaf in _leaves(value)]
    return [outputs] if isinstance(outputs, Tensor) else []


class Movement:
    """Movement accumulated over a training run: ``-t * dL/dt`` of every step (Sanh et al. 2020, arXiv 2005.07683).

    Call `update` after each ``loss.backward()`` and before ``optimizer.step()``; with a gradient scaler, after
    ``scaler.unscale_(optimizer)``. With DistributedDataParallel, gradients and so scores are equal in every process.

    Args:
        model: not changed.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[3.0, -1.0]])
    >>> follower = Movement(model)
    >>> for x in torch.tensor([[[2.0, 5.0]], [[1.0, -4.0]]]):
    ...     model.zero_grad()
    ...     model(x).sum().backward()
    ...     follower.update()
    >>> list(follower.scores().values())
    [tensor([[-9.,  1.]])]
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, refs = unwrapped(model)
        tensors = {ref.module_name: ref.parameter.detach() for ref in refs}
        self._sums = {name: torch.zeros_like(t, dtype=sum_dtype(t)) for name, t in tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the movement of the present gradients; a layer without a gradient adds nothing."""
        for ref in prunable_tensors(self._model):
            gradient = ref.parameter.grad
            if gradient is not None:
                total = self._sums[ref.module_name] = self._sums[ref.module_name].to(gradient.device)
                total.addcmul_(ref.parameter.to(total.dtype), gradient.to(total.dtype), value=-1)

    def scores(self) -> Scores:
        """Copies of the sums so far; entries that are pruned by now have the score -inf.

        Raises:
            ScoreError: a gradient was NaN or infinite.
        """
        _, refs = unwrapped(self._model)
        sums = [self._sums[ref.module_name].clone(memory_format=torch.contiguous_format) for ref in refs]
        return _scores(refs, sums)

    def state_dict(self) -> dict[str, Tensor]:
        """{layer name: copy of its sum}. Inverse: `load_state_dict`."""
        return {name: total.clone() for name, total in self._sums.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Resume from a saved state.

        Raises:
            CheckpointError: the state of another model; nothing has changed.
        """
        check_state(state_dict, self._sums)
        for name, total in self._sums.items():
            total.copy_(state_dict[name])


def check_state(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless tensors of a saved state have the names and shapes of the present ones."""
    shapes, others = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (saved, present))
    differing = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            "A saved state must have the tensors of this model, in the same shapes.",
            f"differences in {listed(differing)}; {name!r} has shape {shapes.get(name)} instead of {others.get(name)}",
            "load the state that was saved for this model",
        )


def ranks(scores: Mapping[Target, Tensor]) -> Scores:
    """Non-negative scores in the same order, float64: 0 for the smallest of all tensors together.

    For libraries that rank by absolute value. Equal scores have equal ranks.

    >>> layer = nn.Linear(3, 1)
    >>> list(ranks({(layer, "weight"): torch.tensor([[-5.0, 2.0, -5.0]])}).values())
    [tensor([[0., 1., 0.]], dtype=torch.float64)]
    """
    if not scores:
        raise SelectionError(
            "There must be scores to rank.", "an empty mapping", "pass what a score of `ip_plugin.methods` has returned"
        )
    first = next(iter(scores.values()))
    flat = torch.cat([score.detach().flatten().to(first.device) for score in scores.values()])
    numbers = torch.unique(flat, return_inverse=True)[1].double().split([score.numel() for score in scores.values()])
    return {
        target: number.reshape(score.shape).to(score.device)
        for (target, score), number in zip(scores.items(), numbers, strict=True)
    }


@torch.no_grad()
def _scores(refs: list[TensorRef], values: list[Tensor]) -> Scores:
    """Values by target, checked to be finite, and -inf where an entry is pruned."""
    scores: Scores = {}
    for ref, value in zip(refs, values, strict=True):
        # One pass computes the sum, which may be infinite without any entry being so.
        if not math.isfinite(value.sum()) and (bad := int((~value.isfinite()).sum())):
            raise ScoreError(
                "Scores must be finite.",
                f"layer {ref.module_name!r}: {bad} NaN or infinite scores",
                "score a model that has not diverged, on data and with a loss whose gradients are finite",
            )
        scores[ref.target] = (value if ref.mask is None else value.masked_fill(~ref.mask, -math.inf)).contiguous()
    return scores
