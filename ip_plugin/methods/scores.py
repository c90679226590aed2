"""Scores: what every prunable entry of a model is worth. The larger, the sooner it is kept.

Scores are a dict with one tensor for each target of ``ip_plugin.prunable(model)``, of the target's shape, contiguous.
In the interspace they are about coefficients; scores that depend on the gauge read them with basis filters of unit
norm. Entries that are pruned already, by our mask or by that of `torch.nn.utils.prune`, have the score -inf; all others
are finite.

The functions are pure: parameters, buffers (BatchNorm statistics), gradients, modes and the random state of torch are
afterwards as they were, also if a function fails. Data is scored in the mode that the model is in. A model that is
wrapped in DistributedDataParallel gets the same scores in every process: gradients are summed over the processes. A
compiled model is scored without being compiled.

Scores can be given to `torch.nn.utils.prune` as ``importance_scores``. That host ranks by absolute value; `grasp` and
`movement` have signs, so give it their `ranks`.

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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from ..core.gauge import unit_gauge
from ..core.parametrization import Interspace
from ..core.tensor_ref import Target, TensorRef, prunable_tensors
from ..errors import (
    InvalidOutputsError,
    InvalidTemperatureError,
    MovementMismatchError,
    NonFiniteScoresError,
    NothingToPruneError,
)
from ..utils.example_input import run
from .derivatives import Batches, Loss, derive, first_order, pure, sum_dtype, unwrapped

Scores: TypeAlias = dict[Target, Tensor]


def random(model: nn.Module, *, generator: torch.Generator) -> Scores:
    """Uniform noise in [0, 1).

    Args:
        model: not changed.
        generator: source of the noise; a CPU generator gives the same noise whatever device the model is on. Its seed
            must not be the one that has initialised the weights: the noise would rank them.

    Raises:
        NothingToPruneError: the model has no prunable layer.

    >>> [score.shape for score in random(nn.Linear(3, 2), generator=torch.Generator()).values()]
    [torch.Size([2, 3])]
    """
    _, found = unwrapped(model)
    noise = [torch.rand(each.parameter.shape, generator=generator, device=generator.device) for each in found]
    return _scores(found, [n.to(each.parameter.device) for n, each in zip(noise, found, strict=True)])


@torch.no_grad()
def magnitude(model: nn.Module) -> Scores:
    """``abs(t)`` in unit gauge (Han et al. 2015, arXiv 1506.02626).

    Args:
        model: not changed.

    Raises:
        NothingToPruneError: the model has no prunable layer.
        NonFiniteScoresError: NaN or infinity in the model.
    """
    _, found = unwrapped(model)
    return _scores(found, [unit_gauge(each.parameter.detach(), each.parametrization).abs() for each in found])


@torch.no_grad()
def lamp(model: nn.Module) -> Scores:
    """``t^2`` in unit gauge, over the sum of ``t^2`` of those entries of the layer that are at least as large.

    After Lee et al. 2021 (arXiv 2010.07611). Pruned entries are in no sum. Every layer's largest entry has the score 1
    (if no other is as large), so that pruning by one global threshold leaves something of each.

    Args:
        model: not changed.

    Raises:
        NothingToPruneError: the model has no prunable layer.
        NonFiniteScoresError: NaN or infinity in the model.

    >>> model = nn.Linear(3, 1)
    >>> model.weight.data = torch.tensor([[1.0, -3.0, 2.0]])
    >>> [score] = lamp(model).values()
    >>> score * 182
    tensor([[ 13., 182.,  56.]], dtype=torch.float64)
    """
    _, found = unwrapped(model)
    return _scores(found, [_lamp(each) for each in found])


def _lamp(layer: TensorRef) -> Tensor:
    magnitudes = unit_gauge(layer.parameter.detach(), layer.parametrization).abs()
    if layer.mask is not None:
        magnitudes = magnitudes * layer.mask
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
        model: not changed; scored in the mode that it is in.
        batches: pairs (inputs, targets), on the model's device.
        loss: called with (outputs, targets).

    Raises:
        NothingToPruneError: the model has no prunable layer.
        NoBatchesError, InvalidBatchError: there are no batches, or one is no pair.
        InvalidLossError: the loss is not one finite number, or does not depend on the prunable tensors.
        NonFiniteScoresError: NaN or infinity among the gradients.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[3.0, -1.0]])
    >>> [score] = snip(model, [(torch.tensor([[2.0, 5.0]]), None)], lambda outputs, _: outputs.sum()).values()
    >>> score
    tensor([[6., 5.]])
    """
    found, gradients = derive(model, batches, loss, first_order)
    return _scores(found, [_times(each, g).abs_() for each, g in zip(found, gradients, strict=True)])


def movement(model: nn.Module, batches: Batches, loss: Loss) -> Scores:
    """``-t * dL/dt``, summed over the batches (Sanh et al. 2020, arXiv 2005.07683), without training in between.

    Positive where a step of gradient descent moves an entry away from zero. `Movement` accumulates the same over a
    training run.

    Args, raises: as `snip`.
    """
    found, gradients = derive(model, batches, loss, first_order)
    return _scores(found, [_times(each, g).neg_() for each, g in zip(found, gradients, strict=True)])


def grasp(model: nn.Module, batches: Batches, loss: Loss, temperature: float = 200) -> Scores:
    """``t * (H v)``: `v` the gradient and `H` the Hessian over the prunable tensors, summed over the batches.

    After Wang et al. 2020 (arXiv 2002.07376), who remove the largest ``-t * (H v)``: the same order. In unit gauge,
    which takes `H` and `v` with it. Dropout falls alike in both derivatives.

    Args:
        model: not changed; scored in the mode that it is in. Its outputs must be one tensor, the logits.
        batches: pairs (inputs, targets), on the model's device; all are kept until the end, for they are read twice.
        loss: called with (outputs / temperature, targets).
        temperature: what outputs are divided by.

    Raises:
        As `snip`, and InvalidTemperatureError, InvalidOutputsError.
    """
    if not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise InvalidTemperatureError(temperature)

    def cooled(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise InvalidOutputsError("GraSP", "outputs that can be divided: one tensor", f"a {type(outputs).__name__}")
        return loss(outputs / temperature, targets)

    kept = list(batches)
    found, gradient = derive(model, kept, cooled, first_order)
    with torch.inference_mode(False):
        directions = [_over_squared_norms(each, g) for each, g in zip(found, gradient, strict=True)]

    def product_with_hessian(value: Tensor, tensors: list[Tensor]) -> Sequence[Tensor]:
        gradients = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
        along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        assert isinstance(along, Tensor)
        if not along.requires_grad:  # the loss is linear
            return [torch.zeros_like(t) for t in tensors]
        return torch.autograd.grad(along, tensors, materialize_grads=True)

    found, products = derive(model, kept, cooled, product_with_hessian)
    return _scores(found, [_times(each, p) for each, p in zip(found, products, strict=True)])


def _over_squared_norms(layer: TensorRef, gradient: Tensor) -> Tensor:
    """Of the two factors one belongs to the gradient, the other to the Hessian that is applied to it."""
    norms = None if layer.interspace is None else layer.interspace.filter_norms
    if norms is not None:
        norms = norms.reshape(1, 1, *gradient.shape[2:])
        # The gradient of a coefficient whose filter is zero is zero; so is its score.
        return gradient * torch.where(norms > 0, norms.square().reciprocal(), 0.0)
    return gradient


def synflow(model: nn.Module, example_input: Any) -> Scores:
    """``abs(t * dR/dt)``: the flow through every entry of a network without signs. Needs no data.

    After Tanaka et al. 2020 (arXiv 2006.05467). `R` is the sum of the outputs in evaluation mode, for an input of ones,
    when all parameters (coefficients and bases too) have their absolute values. Running means are read as zero: they
    are those of a network with signs, and would close gates. Works and returns in float64, for the flow through a deep
    network leaves the range of float32.

    Meant for many rounds, each of which prunes a little: density ``d**((k + 1) / 100)`` in round ``k`` of 100.

    Args:
        model: not changed.
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes matter. Tensors
            that are not floating point (token ids) are used as they are.

    Raises:
        NothingToPruneError: the model has no prunable layer.
        ExampleInputError: the model does not run on the example input.
        InvalidOutputsError: no output is a floating point tensor that depends on the prunable tensors.
        NonFiniteScoresError: NaN or infinity in the model, or a flow out of the range of float64.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> model[0].weight.data = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    >>> model[1].weight.data = torch.tensor([[-2.0, 1.0]])
    >>> for score in synflow(model, torch.zeros(1, 2)).values():
    ...     print(score.tolist())
    [[2.0, 4.0], [0.0, 3.0]]
    [[6.0, 3.0]]
    """
    inner, found = unwrapped(model)
    means = {id(module.running_mean) for module in inner.modules() if isinstance(module, _NormBase)}
    with pure(inner):
        tensors = {name: _wide(p.detach().abs()) for name, p in inner.named_parameters()}
        for name, buffer in inner.named_buffers():
            tensors[name] = _wide(torch.zeros_like(buffer) if id(buffer) in means else buffer.detach().clone())
        name_of = {id(p): name for name, p in inner.named_parameters()}
        for space in inner.modules():
            if isinstance(space, Interspace):  # it is the filters that kernels are composed of that lose their signs
                tensors[name_of[id(space.basis)]] = _wide(space.effective_basis.detach().abs())
        for space in inner.modules():
            if isinstance(space, Interspace):
                space.constraint = "none"
        leaves = [tensors[name_of[id(each.parameter)]].requires_grad_() for each in found]
        outputs = run(_Substituted(inner, tensors), _ones(example_input))
        flow = sum(each.double().sum() for each in _floating(outputs))
        if not isinstance(flow, Tensor) or not flow.requires_grad:
            rule = "a floating point output that depends on the prunable tensors"
            raise InvalidOutputsError("SynFlow", rule, f"a {type(outputs).__name__}")
        gradients = torch.autograd.grad(flow, leaves, materialize_grads=True)
    return _scores(found, [(t.detach() * g).abs_() for t, g in zip(leaves, gradients, strict=True)])


class _Substituted(nn.Module):
    """A model with other tensors in the place of its own, which keeps the graph where gradients are off."""

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


def _floating(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _floating(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _floating(value)


class Movement:
    """Movement accumulated over a training run: ``-t * dL/dt`` of every step (Sanh et al. 2020, arXiv 2005.07683).

    Call `update` after each ``loss.backward()`` and before ``optimizer.step()``; with a gradient scaler, after
    ``scaler.unscale_(optimizer)``. In DistributedDataParallel gradients, and so scores, are equal in every process.

    Args:
        model: its prunable tensors are followed, not changed.

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
        self._model, found = unwrapped(model)
        tensors = {each.module_name: each.parameter.detach() for each in found}
        self._sums = {name: torch.zeros_like(t, dtype=sum_dtype(t)) for name, t in tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add what the present gradients say; a layer without a gradient adds nothing."""
        for layer in prunable_tensors(self._model):
            gradient = layer.parameter.grad
            if gradient is not None:
                total = self._sums[layer.module_name] = self._sums[layer.module_name].to(gradient.device)
                total.addcmul_(layer.parameter.to(total.dtype), gradient.to(total.dtype), value=-1)

    def scores(self) -> Scores:
        """The sums so far, copies; entries that are pruned by now have the score -inf.

        Raises:
            NonFiniteScoresError: a gradient was NaN or infinite.
        """
        _, found = unwrapped(self._model)
        return _scores(
            found, [self._sums[each.module_name].clone(memory_format=torch.contiguous_format) for each in found]
        )

    def state_dict(self) -> dict[str, Tensor]:
        """{layer name: sum}, copies. Inverse: `load_state_dict`."""
        return {name: total.clone() for name, total in self._sums.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from a saved state.

        Raises:
            MovementMismatchError: the state of another model; nothing has changed.
        """
        if state_dict.keys() != self._sums.keys():
            differ = sorted(state_dict.keys() ^ self._sums.keys())
            raise MovementMismatchError(f"layers that only one of both has: {', '.join(map(repr, differ))}")
        for name, total in self._sums.items():
            if state_dict[name].shape != total.shape:
                shapes = f"shape {tuple(state_dict[name].shape)} instead of {tuple(total.shape)}"
                raise MovementMismatchError(f"layer {name!r}: {shapes}")
        for name, total in self._sums.items():
            total.copy_(state_dict[name])


def ranks(scores: Mapping[Target, Tensor]) -> Scores:
    """Scores that are not negative, in the same order: 0 for the smallest of all tensors together, float64.

    For hosts that rank by absolute value; equal scores have equal ranks.

    >>> layer = nn.Linear(3, 1)
    >>> list(ranks({(layer, "weight"): torch.tensor([[-5.0, 2.0, -5.0]])}).values())
    [tensor([[0., 1., 0.]], dtype=torch.float64)]
    """
    if not scores:
        raise NothingToPruneError
    first = next(iter(scores.values()))
    flat = torch.cat([score.detach().flatten().to(first.device) for score in scores.values()])
    places = torch.unique(flat, return_inverse=True)[1].double().split([score.numel() for score in scores.values()])
    return {
        where: place.reshape(score.shape).to(score.device)
        for (where, score), place in zip(scores.items(), places, strict=True)
    }


@torch.no_grad()
def _times(layer: TensorRef, gradient: Tensor) -> Tensor:
    return gradient * layer.parameter.detach()


@torch.no_grad()
def _scores(found: list[TensorRef], values: list[Tensor]) -> Scores:
    """Values by target, checked, and -inf where an entry is pruned."""
    for layer, value in zip(found, values, strict=True):
        # The sum tells by one pass; it may be infinite without any entry being so.
        if not math.isfinite(value.sum()) and (bad := int((~value.isfinite()).sum())):
            raise NonFiniteScoresError(f"layer {layer.module_name!r}", bad)
    return {
        layer.target: (value if layer.mask is None else value.masked_fill(~layer.mask, -math.inf)).contiguous()
        for layer, value in zip(found, values, strict=True)
    }
