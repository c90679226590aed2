"""A view of a model as ordinary layers, for pruning libraries that know nothing of parametrizations.

While a model is exposed, every tensor under a parametrization of this package is an ordinary Parameter of an ordinary
module: the very Parameter that holds the coefficients. It shows them masked and scaled as if every basis filter had
unit norm, and gradients scaled inversely. Afterwards, what was written is scaled back; the rest is bit-identical.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ip_plugin.adapters.shared.transaction import transaction
from ip_plugin.basis import bases
from ip_plugin.core import torch_masks
from ip_plugin.core.parametrization import Interspace, Mask, parametrizations, restore_order
from ip_plugin.core.tensor_ref import Target, TensorRef, own_tensors, parametrized_by_another
from ip_plugin.errors import HostError

Rows: TypeAlias = "slice | types.EllipsisType"
_COMPARED_AT_ONCE = 1 << 18


class PlainView:
    """Exposes a model as plain layers: ``with view.expose(): ...``, which may be nested.

    Args:
        model: exposed while a block runs, and restored afterwards.
        in_unit_gauge: asked at the beginning of each block; False shows coefficients without the filter scale.
    """

    def __init__(self, model: nn.Module, in_unit_gauge: Callable[[], bool] = lambda: True) -> None:
        self.model = model
        self.in_unit_gauge = in_unit_gauge
        self.depth = 0
        self.tensors: dict[Target, ExposedTensor] = {}
        self.shown = False
        self._names: dict[nn.Module, str] = {}

    @contextmanager
    def expose(
        self, modules: Collection[nn.Module] | None = None, previous: Collection[ExposedTensor] | None = None
    ) -> Iterator[PlainView]:
        """Expose the model while the block runs.

        Args:
            modules: those that are exposed, without their children; None exposes all.
            previous: `tensors` of an earlier block, so that they need not be searched for again.

        Raises:
            ConversionError: someone else's parametrization sits beside or on top of ours.
            HostError: after the block: Parameters were replaced by other means than `follow`.
        """
        if self.depth == 0:
            self._expose(modules, previous)
        self.depth += 1
        replaced: list[ExposedTensor] = []
        try:
            yield self
        finally:
            self.depth -= 1
            if self.depth == 0:
                replaced = [tensor for tensor in self.tensors.values() if tensor.is_replaced]
                self._restore()
        if replaced:
            raise HostError(
                "Only groups of a pruner made by ip_plugin.adapters.torch_pruning.pruner may replace Parameters.",
                f"the parameter of {replaced[0].ref.module_name!r} was replaced by something else",
                "remove channels with such a pruner",
            )

    def _expose(self, modules: Collection[nn.Module] | None, previous: Collection[ExposedTensor] | None) -> None:
        if previous is None or not all(tensor.is_current() for tensor in previous):
            if modules is None:
                self._names = {module: name for name, module in self.model.named_modules()}
                modules = self._names
            _adopt_masks(modules)
            parametrized = (module for module in modules if parametrize.is_parametrized(module))
            refs = [ref for module in parametrized for ref in own_tensors(module, self._names.get(module, "?"))]
            previous = [ExposedTensor(ref, ref.chain) for ref in refs if ref.chain is not None]
        unit = self.in_unit_gauge()
        for tensor in previous:
            tensor.parameter, tensor.unit = tensor.chain.original, unit  # type: ignore[assignment]
        self.tensors = {(tensor.ref.module, tensor.ref.tensor_name): tensor for tensor in previous}
        for module, tensors in self._by_module().items():
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
            for tensor in tensors:
                module.register_parameter(tensor.ref.tensor_name, tensor.parameter)
            restore_order(module, tensors[0].parametrization.order)
            _EXPOSED[module] = tensors

    def _restore(self) -> None:
        for tensor in self.tensors.values():
            tensor.hide()
        for module, tensors in self._by_module().items():
            _EXPOSED.pop(module, None)
            for tensor in tensors:
                tensor.chain.register_parameter("original", tensor.parameter)
                module._parameters.pop(tensor.ref.tensor_name, None)
            module.__class__ = tensors[0].cls
            module._modules["parametrizations"] = tensors[0].children
        self.tensors, self.shown = {}, False

    def show(self) -> None:
        """Show masked and scaled values from now on; until then every value is the exact one."""
        if not self.shown:
            self.shown = True
            for tensor in self.tensors.values():
                tensor.show()

    def _by_module(self) -> dict[nn.Module, list[ExposedTensor]]:
        by_module: dict[nn.Module, list[ExposedTensor]] = {}
        for tensor in self.tensors.values():
            by_module.setdefault(tensor.ref.module, []).append(tensor)
        return by_module

    @contextmanager
    def exact(self, targets: Iterable[Target]) -> Iterator[list[ExposedTensor]]:
        """While the block runs, some of the exposed tensors have their exact values, for a library that prunes them."""
        tensors = [self.tensors[target] for target in targets if target in self.tensors]
        for tensor in tensors:
            tensor.hide()
        yield tensors
        if self.shown:
            for tensor in tensors:
                tensor.show()


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[nn.Module]:
    """While the block runs, the model looks like one of ordinary layers, for functions that look at layers.

    Their ``weight`` holds the masked coefficients, scaled as if every basis filter had unit norm, and ``weight.grad``
    the gradient for it: an importance of Torch-Pruning that is called by hand reads these. Channels must not be removed
    in the block; only groups of a pruner made by `ip_plugin.adapters.torch_pruning.pruner` can do that. Masks of
    `torch.nn.utils.prune` become masks of this package.

    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(1, 2, 3)), basis=2 * torch.eye(9))
    >>> with plain_layers(model):
    ...     type(model[0]).__name__
    'Conv2d'
    """
    with transaction(model.modules()), PlainView(model).expose() as view:
        view.show()
        yield model


class ExposedTensor:
    """One tensor that is exposed as an ordinary Parameter.

    Attributes:
        ref: the tensor; while it is exposed, its module and names only.
        chain: torch's list of its parametrizations; `parametrization` is the only one.
        parameter: the exposed Parameter; code that lets a library replace it must set this to the new one.
        unit: whether it is shown as if every basis filter had unit norm.
    """

    parameter: nn.Parameter
    unit: bool

    def __init__(self, ref: TensorRef, chain: parametrize.ParametrizationList) -> None:
        _refuse_foreign(ref)
        self.ref, self.chain = ref, chain
        self.parametrization: Mask = chain[0]  # type: ignore[assignment]
        self.cls, self.children = type(ref.module), parametrizations(ref.module)
        self.names = tuple(self.children)
        self._exact: Tensor | None = None
        self._exact_grad: Tensor | None = None
        self._scale: Tensor | None = None

    def is_current(self) -> bool:
        """Whether the tensor is still under this parametrization, and no other."""
        module = self.ref.module
        return (
            type(module) is self.cls
            and module._modules.get("parametrizations") is self.children
            and self.chain._parameters.get("original") is not None
            and len(self.chain) == 1
            and tuple(parametrizations(module)) == self.names
        )

    @property
    def is_replaced(self) -> bool:
        """Whether the module has another Parameter by now."""
        return self.ref.module._parameters.get(self.ref.tensor_name) is not self.parameter

    @torch.no_grad()
    def show(self) -> None:
        """Write masked and scaled values into the Parameter; inverse: `hide`."""
        if self.unit and isinstance(self.parametrization, Interspace):
            norms = self.parametrization.filter_norms
            # Norms that are 1 up to rounding scale nothing.
            if norms is not None and not bool(((norms - 1).abs() <= 8 * torch.finfo(norms.dtype).eps).all()):
                self._scale = norms.reshape(1, 1, *self.parameter.shape[2:])
        if self._scale is not None or self.parametrization.mask is not None:
            self._exact = self.parameter.data
            self.parameter.data = self._shown(self._exact)
        if self._scale is not None and self.parameter.grad is not None:
            exact: Tensor = self.parameter.grad
            self._exact_grad, self.parameter.grad = exact, exact / self._scale

    @torch.no_grad()
    def hide(self) -> None:
        """Put the exact values back, with what was written since `show`, scaled back."""
        scale = 1 if self._scale is None else self._scale
        if self._exact is not None:
            _write_back(self.parameter.data, self._exact, self._shown, lambda values: values / scale)
            self.parameter.data = self._exact
        if self._scale is not None and self.parameter.grad is not None:
            if self._exact_grad is None:
                self.parameter.grad = self.parameter.grad * scale
            else:
                _write_back(
                    self.parameter.grad, self._exact_grad, lambda grad, _: grad / scale, lambda values: values * scale
                )
                self.parameter.grad = self._exact_grad
        self._exact = self._exact_grad = self._scale = None

    def composed(self) -> Tensor:
        """The kernels composed from the values that are in the Parameter now."""
        space, values = self.parametrization, self.parameter.detach()
        if not isinstance(space, Interspace):
            return values
        basis = space.effective_basis.detach()
        if self._scale is not None:  # the coefficients are shown scaled, so they belong to filters of unit norm
            norms = self._scale.reshape(-1, 1)
            basis = torch.where(norms > 0, basis / norms, 0)
        return bases.compose(values, basis)

    def _shown(self, values: Tensor, rows: Rows = ...) -> Tensor:
        scaled = values.clone() if self._scale is None else values * self._scale
        mask = self.parametrization.mask
        return scaled if mask is None else scaled.mul_(mask[rows])


_EXPOSED: WeakKeyDictionary[nn.Module, list[ExposedTensor]] = WeakKeyDictionary()


def kernels(module: nn.Module) -> Tensor:
    """The kernels of a layer; of one that is exposed, whose ``weight`` holds coefficients, they are composed."""
    for tensor in _EXPOSED.get(module, ()):
        if tensor.ref.tensor_name == "weight":
            return tensor.composed()
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach()


def _write_back(
    values: Tensor, exact: Tensor, shown: Callable[[Tensor, Rows], Tensor], inverse: Callable[[Tensor], Tensor]
) -> None:
    """Where `values` differ from `shown(exact)`, set `exact` to their `inverse`.

    By rows: most of them are equal, and so nothing large is allocated.
    """
    rows: Iterable[Rows] = (...,)
    if exact.dim() and exact.numel() > _COMPARED_AT_ONCE:
        step = max(1, _COMPARED_AT_ONCE * len(exact) // exact.numel())
        rows = (slice(start, start + step) for start in range(0, len(exact), step))
    for some in rows:
        before = shown(exact[some], some)
        if not torch.equal(values[some], before):
            exact[some] = torch.where(values[some] == before, exact[some], inverse(values[some]))


def _adopt_masks(modules: Iterable[nn.Module]) -> None:
    """Replace every mask that `torch.nn.utils.prune` has put on tensors of some modules by one of ours."""
    for module in modules:
        # Torch keeps the weights of recurrent layers in a list, too.
        if TensorRef(module).is_foreign or isinstance(module, nn.RNNBase):
            continue
        for name in torch_masks.pruned_names(module):
            kept = torch_masks.take_off(module, name)
            assert kept is not None
            TensorRef(module, name).add_mask(kept)


def _refuse_foreign(ref: TensorRef) -> None:
    for tensor_name, chain in parametrizations(ref.module).items():
        others = [type(parametrization).__name__ for parametrization in chain if not isinstance(parametrization, Mask)]
        if others:
            raise parametrized_by_another(
                ref.module_name,
                f"{', '.join(others)}, besides that of ip_plugin",
                "bake the model first and add the other parametrization afterwards; to rescue a trained model, copy "
                "`layer.weight` into a plain model (torch's remove_parametrizations would damage the layer)",
                tensor_name,
            )
