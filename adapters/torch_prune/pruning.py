"""`torch.nn.utils.prune` in either space: a drop-in for that module.

Change one import and an existing pipeline runs, whether `interspace` was called or not::

    from ip_plugin.adapters import torch_prune as prune

Every public function and class of torch's module (the host) is here, with its arguments, and its own code chooses what
to prune. The difference is how a mask is kept: not as a hook, a ``weight_orig`` and a ``weight_mask``, but as a bool
mask in the layer's parametrization. So pruned models can be copied with ``copy.deepcopy`` (except recurrent layers:
torch keeps their weights in a list); ``weight_orig`` and ``weight_mask`` can still be read as attributes. In the
interspace ``(conv, "weight")`` means the coefficients, and magnitudes are those for basis filters of unit norm. A
tensor that is pruned again after ``optimizer.step()`` is ranked by its present values; torch's module would rank it by
the values of the last forward pass.

>>> import torch
>>> from torch import nn
>>> from ip_plugin import interspace, masks
>>> model = interspace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)))
>>> global_unstructured([(model[0], "weight"), (model[2], "weight")], L1Unstructured, amount=200)
>>> sum(int((~mask).sum()) for mask in masks(model).values())
200
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as host

from ip_plugin.core import torch_masks
from ip_plugin.core.gauge import unit_gauge
from ip_plugin.core.masking import warn_of_thin_layers
from ip_plugin.core.parametrization import Interspace, leave, restore_order
from ip_plugin.core.tensor_ref import Target, TensorRef, described, parametrized_tensors
from ip_plugin.errors import AmountError, MaskError, ScoreError, SelectionError
from ip_plugin.utils.validation import is_count, is_fraction

M = TypeVar("M", bound=nn.Module)
Amount: TypeAlias = int | float


@contextmanager
def _host_mask(ref: TensorRef, *, ones: bool = False) -> Iterator[None]:
    """While the block runs, our mask (or `ones`) is a mask of the host; then the host's is ours. Undone if it fails."""
    if ref.is_foreign:  # the host keeps its mask
        yield
        return
    target = ref.target
    before = ref.mask
    theirs = torch_masks.take_off(*target)
    order = tuple(target[0]._parameters)
    if before is None and ones:
        before = torch.ones_like(getattr(*target), dtype=torch.bool)
    _set_host_mask(target, before)
    try:
        yield
    except BaseException:
        torch_masks.take_off(*target)
        restore_order(target[0], order)
        _set_host_mask(target, theirs)
        raise
    kept = torch_masks.take_off(*target)
    restore_order(target[0], order)
    if kept is not None:
        ref.set_mask(kept)


def _set_host_mask(target: Target, mask: Tensor | None) -> None:
    """Make `mask` the host's mask of a target that it has not pruned."""
    if mask is not None:
        host.custom_from_mask(*target, mask=mask)
        # The host flattens masks with `view`, which fails on channels_last.
        module, name = target[0], target[1] + "_mask"
        module.register_buffer(name, getattr(module, name).contiguous())


def _scores(ref: TensorRef, given: Tensor | None) -> Tensor:
    """The scores by which the host ranks: those given, or the masked tensor for filters of unit norm; contiguous."""
    tensor: Tensor = getattr(*ref.target).detach()
    if given is not None:
        check_scores(given, tensor, ref.target[1])
        return given.contiguous()
    return unit_gauge(tensor, ref.parametrization).contiguous()


def check_scores(scores: Tensor, tensor: Tensor, name: str) -> None:
    """Raise ScoreError unless scores have the shape of the tensor that they are for."""
    if scores.shape != tensor.shape:
        raise ScoreError(
            f"Importance scores must have the shape of the tensor that they are for: {name!r}, {tuple(tensor.shape)}.",
            f"shape {tuple(scores.shape)}",
            "compute one score for each entry of the tensor that is pruned",
        )


def _check_amount(amount: object, available: int) -> None:
    fits = amount <= available if is_count(amount) else not isinstance(amount, int) and is_fraction(amount)
    if not fits:  # 1 is one entry, 1.0 is all
        raise AmountError(
            f"An amount must be a fraction in [0, 1] or a count of at most {available}.",
            f"{amount!r} ({type(amount).__name__})",
            f"pass a float between 0.0 and 1.0, or an int between 0 and {available}",
        )


def _available(ref: TensorRef, dim: int | None = None) -> int:
    """The number of entries, or of slices along `dim`, that are not pruned yet."""
    tensor = getattr(*ref.target)
    kept = torch_masks.mask(*ref.target)
    if kept is None:
        kept = torch.ones_like(tensor, dtype=torch.bool)
    if dim is None or not -tensor.dim() <= dim < tensor.dim():
        return int(kept.sum())
    return int(kept.movedim(dim, 0).flatten(1).any(dim=1).sum())


class BasePruningMethod(host.BasePruningMethod):
    """Torch's base class for custom pruning methods, in either space.

    Subclass it like torch's: define ``PRUNING_TYPE`` and ``compute_mask(t, default_mask)``; ``t`` holds the masked
    coefficients for basis filters of unit norm (or the importance scores given).

    >>> class EveryOther(BasePruningMethod):
    ...     PRUNING_TYPE = "unstructured"
    ...     def compute_mask(self, t, default_mask):
    ...         mask = default_mask.clone()
    ...         mask.view(-1)[::2] = 0
    ...         return mask
    >>> layer = nn.Linear(2, 2)
    >>> method = EveryOther.apply(layer, "weight")
    >>> layer.weight_mask
    tensor([[0., 1.],
            [0., 1.]])
    """

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> host.BasePruningMethod:
        """Prune a tensor; see torch's documentation of ``BasePruningMethod.apply``.

        Raises:
            AmountError, MaskError, ScoreError: nothing has changed.
        """
        ref = TensorRef(module, name)
        with _host_mask(ref):
            if "amount" in kwargs:
                structured = getattr(cls, "PRUNING_TYPE", None) == "structured"
                _check_amount(kwargs["amount"], _available(ref, kwargs.get("dim", -1) if structured else None))
            scores = _scores(ref, importance_scores)
            method: host.BasePruningMethod = super().apply(  # type: ignore[no-untyped-call]
                *ref.target, *args, importance_scores=scores, **kwargs
            )
        _expose(module, name)
        return method


class Identity(host.Identity, BasePruningMethod):  # type: ignore[misc]
    """Prunes nothing: sets a mask of ones."""


class RandomUnstructured(host.RandomUnstructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes entries at random; see torch's class."""


class L1Unstructured(host.L1Unstructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes the entries of smallest magnitude; see torch's class."""


class RandomStructured(host.RandomStructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes slices along a dimension at random; see torch's class."""


class LnStructured(host.LnStructured, BasePruningMethod):  # type: ignore[misc]
    """Prunes the slices along a dimension whose L_n norm is smallest; see torch's class."""


class CustomFromMask(host.CustomFromMask, BasePruningMethod):
    """Prunes by a given mask; see torch's class."""

    @classmethod
    def apply(cls, module: nn.Module, name: str, mask: Tensor) -> host.BasePruningMethod:  # type: ignore[override]
        """Prune a tensor by a mask of its shape, 1 = kept."""
        tensor = getattr(*TensorRef(module, name).target)
        if not isinstance(mask, Tensor) or mask.shape != tensor.shape:
            raise MaskError(
                f"The mask of tensor {name!r} must be a tensor of shape {tuple(tensor.shape)}.",
                f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}",
                "make it like the tensor that is pruned; 1 keeps an entry",
            )
        return super().apply(module, name, mask)  # type: ignore[no-any-return, no-untyped-call]


def _expose(module: nn.Module, name: str) -> None:
    """Make ``weight_mask`` and ``weight_orig`` readable, as they are after the host's pruning."""
    if TensorRef(module, name).chain in (None, module):
        return
    cls = type(module)  # torch's own class for this module and its copies

    def our_mask(self: nn.Module, attribute: str) -> Tensor:
        parametrization = TensorRef(self, name).parametrization
        if parametrization is None or parametrization.mask is None:
            raise AttributeError(attribute)
        return parametrization.mask

    def mask(self: nn.Module) -> Tensor:
        return our_mask(self, f"{name}_mask").to(getattr(*TensorRef(self, name).target).dtype)

    def original(self: nn.Module) -> nn.Parameter:
        our_mask(self, f"{name}_orig")
        return TensorRef(self, name).parameter

    for attribute, getter in ((f"{name}_mask", mask), (f"{name}_orig", original)):
        setattr(cls, attribute, property(getter))


def _prune(method: Any, module: M, *arguments: Any) -> M:
    method.apply(module, *arguments)
    return module


def identity(module: M, name: str) -> M:
    """Set a mask of ones on a tensor; returns the module."""
    return _prune(Identity, module, name)


def random_unstructured(module: M, name: str, amount: Amount) -> M:
    """Prune `amount` (a fraction, or a count) of the unpruned entries of a tensor at random; returns the module."""
    return _prune(RandomUnstructured, module, name, amount)


def l1_unstructured(module: M, name: str, amount: Amount, importance_scores: Tensor | None = None) -> M:
    """Prune `amount` of the unpruned entries, those of smallest magnitude (or score); returns the module.

    >>> layer = l1_unstructured(nn.Linear(4, 4), "weight", amount=3)
    >>> int((layer.weight == 0).sum())
    3
    """
    return _prune(L1Unstructured, module, name, amount, importance_scores)


def random_structured(module: M, name: str, amount: Amount, dim: int) -> M:
    """Prune `amount` of the unpruned slices along `dim` at random; returns the module."""
    return _prune(RandomStructured, module, name, amount, dim)


def ln_structured(
    module: M, name: str, amount: Amount, n: float | str, dim: int, importance_scores: Tensor | None = None
) -> M:
    """Prune `amount` of the unpruned slices along `dim`, those of smallest L_n norm; returns the module."""
    return _prune(LnStructured, module, name, amount, n, dim, importance_scores)


def custom_from_mask(module: M, name: str, mask: Tensor) -> M:
    """Prune a tensor by a mask of its shape, 1 = kept, on top of what is pruned already; returns the module."""
    return _prune(CustomFromMask, module, name, mask)


def global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    pruning_method: type[host.BasePruningMethod],
    importance_scores: Mapping[tuple[nn.Module, str], Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Prune several tensors together, by one threshold.

    Args:
        parameters: (module, tensor name) pairs, for example ``ip_plugin.prunable(model)``; any iterable.
        pruning_method: an unstructured method: of this module, of torch's, or a custom one.
        importance_scores: {pair: scores}; for other pairs, magnitudes for basis filters of unit norm.
        **kwargs: arguments of the method, such as ``amount`` (a fraction, or a count of entries of all tensors).

    Raises:
        SelectionError: no pair, or one tensor twice; nothing has changed.
        AmountError, ScoreError: nothing has changed.
        TypeError: the method is not unstructured.

    Warns:
        LayerCollapseWarning: tensors keep less than a tenth of the share of entries that all keep together.
    """
    if importance_scores is not None and not isinstance(importance_scores, Mapping):
        raise TypeError("global_unstructured(): importance_scores must be of type dict")
    pairs = list(parameters)
    if not pairs:
        raise SelectionError(
            "At least one (module, tensor name) pair must be given.",
            "an empty iterable (a generator that was used up before?)",
            "pass ip_plugin.prunable(model), or a list of pairs",
        )
    given = {TensorRef(*pair).target: scores for pair, scores in (importance_scores or {}).items()}
    refs: dict[Target, TensorRef] = {}
    for module, name in pairs:
        ref = TensorRef(module, name)
        if ref.target in refs:
            raise SelectionError(
                "Every tensor may be given once, or the count of zeros would not be the count asked for.",
                f"tensor {name!r} of a {type(module).__name__} is given twice",
                "remove the duplicate; (conv, 'weight') and its coefficients are one tensor",
            )
        refs[ref.target] = ref
    with ExitStack() as stack:
        for ref in refs.values():
            stack.enter_context(_host_mask(ref, ones=True))
        if "amount" in kwargs:
            _check_amount(kwargs["amount"], sum(_available(ref) for ref in refs.values()))
        scores = {target: _scores(ref, given.get(target)) for target, ref in refs.items()}
        host.global_unstructured(list(refs), pruning_method, scores, **kwargs)
    for module, name in pairs:
        _expose(module, name)
    kept = [(ref.target, ref.mask) for ref in refs.values()]
    warn_of_thin_layers([(described(target, mask), mask) for target, mask in kept if mask is not None])


@torch.no_grad()
def remove(module: M, name: str) -> M:
    """Make the pruning of a tensor permanent: set masked entries to zero and remove the mask; returns the module.

    A convolution in the interspace stays there; the zeros are in its coefficients.

    Raises:
        MaskError: the tensor has no mask.
    """
    ref = TensorRef(module, name)
    parametrization, kept = ref.parametrization, ref.mask
    if kept is None:
        raise MaskError(
            f"Tensor {name!r} must be pruned before its pruning can be made permanent.",
            f"a {type(module).__name__} without a mask on {name!r}",
            "call a pruning function first; ip_plugin.masks(model) lists what is pruned",
        )
    torch_masks.take_off(*ref.target)
    parameter = ref.parameter
    parameter.mul_(kept)
    if parametrization is not None:
        parametrization.mask = None
        if not isinstance(parametrization, Interspace) and ref.chain is not module:
            leave(module, name, parameter)
    return module


def is_pruned(module: nn.Module) -> bool:
    """Whether any tensor of a module or of its children has a mask, ours or the host's."""
    return host.is_pruned(module) or any(ref.mask is not None for ref in parametrized_tensors(module))
