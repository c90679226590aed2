"""Plain layers for a while: what a host sees that knows nothing of parametrizations.

While a model is lent, every tensor under a parametrization of this package is an ordinary Parameter of an ordinary
module: the very Parameter that holds the coefficients, its masked entries shown as zeros and its magnitudes as they
are where every basis filter has unit norm; gradients are scaled the other way. Given back, what the host did not touch
is bit for bit what it was, and what it wrote is scaled back.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ip_plugin.adapters.shared.transaction import transaction
from ip_plugin.basis import bases
from ip_plugin.core import torch_masks
from ip_plugin.core.parametrization import Interspace, Mask, parametrizations, restore_order
from ip_plugin.core.tensor_ref import TensorRef, own_tensors
from ip_plugin.errors import AlreadyParametrizedError, UnfollowedCutError

Rows: TypeAlias = "slice | types.EllipsisType"
_COMPARED_AT_ONCE = 1 << 18


class PlainView:
    """Lends a model: ``with view.lend(): ...``; it may be lent again while it is lent.

    Args:
        model: lent and given back.
        in_unit_gauge: asked when the model is lent; False shows coefficients in the gauge that they are in.
    """

    def __init__(self, model: nn.Module, in_unit_gauge: Callable[[], bool] = lambda: True) -> None:
        self.model = model
        self.in_unit_gauge = in_unit_gauge
        self.depth = 0
        self.loans: dict[tuple[nn.Module, str], Loan] = {}
        self.shown = False
        self._names: dict[nn.Module, str] = {}

    @contextmanager
    def lend(
        self, modules: Collection[nn.Module] | None = None, again: Collection[Loan] | None = None
    ) -> Iterator[PlainView]:
        """Lend the model while the block runs.

        Args:
            modules: those that are lent, without their children; None lends all.
            again: `loans` of an earlier time, which need not be looked for if the model has them still.

        Raises:
            AlreadyParametrizedError: someone else's parametrization sits beside or on top of ours.
        """
        if self.depth == 0:
            self._lend(modules, again)
        self.depth += 1
        strays: list[Loan] = []
        try:
            yield self
        finally:
            self.depth -= 1
            if self.depth == 0:
                strays = [loan for loan in self.loans.values() if loan.parameter is not loan.lent]
                for loan in self.loans.values():
                    loan.conceal()
                for module, loans in self._by_module().items():
                    _give_back(module, loans)
                self.loans, self.shown = {}, False
        if strays:
            raise UnfollowedCutError(strays[0].layer)

    def _lend(self, modules: Collection[nn.Module] | None, again: Collection[Loan] | None) -> None:
        if again is None or not all(loan.is_held() for loan in again):
            if modules is None:
                self._names = {module: name for name, module in self.model.named_modules()}
                modules = self._names
            take_over_masks(modules)
            refs = [ref for module in modules for ref in own_tensors(module, self._names.get(module, "?"))]
            again = [Loan(ref, ref.chain) for ref in refs if ref.chain is not None]
        unit = self.in_unit_gauge()
        for loan in again:
            loan.begin(unit)
        self.loans = {(loan.module, loan.tensor_name): loan for loan in again}
        for module, of_module in self._by_module().items():
            _make_plain(module, of_module)

    def show(self) -> None:
        """Show masked magnitudes in unit gauge from now on; until then every value is the exact one."""
        if not self.shown:
            self.shown = True
            for loan in self.loans.values():
                loan.show()

    def _by_module(self) -> dict[nn.Module, list[Loan]]:
        found: dict[nn.Module, list[Loan]] = {}
        for loan in self.loans.values():
            found.setdefault(loan.module, []).append(loan)
        return found

    @contextmanager
    def exact(self, tensors: Iterable[tuple[nn.Module, str]]) -> Iterator[list[Loan]]:
        """While the block runs, some of the tensors lent have their exact values, for a host that cuts them."""
        loans = [self.loans[key] for key in tensors if key in self.loans]
        for loan in loans:
            loan.conceal()
        yield loans
        if self.shown:
            for loan in loans:
                loan.show()


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[nn.Module]:
    """For a host's functions that look at layers: while the block runs, the model is one of plain layers.

    Their ``weight`` is the masked coefficients in unit gauge, ``weight.grad`` their gradient: an importance of
    Torch-Pruning that is called by hand reads these. To be read, not cut: only groups of a pruner made by
    `ip_plugin.adapters.torch_pruning.pruner` cut. Masks of `torch.nn.utils.prune` become masks of this package.

    >>> from ip_plugin import interspace
    >>> model = interspace(nn.Sequential(nn.Conv2d(1, 2, 3)), basis=2 * torch.eye(9))
    >>> with plain_layers(model):
    ...     type(model[0]).__name__
    'Conv2d'
    """
    with transaction(model.modules()), PlainView(model).lend() as view:
        view.show()
        yield model


class Loan:
    """One tensor that is lent.

    Attributes:
        layer, module, tensor_name: where it is.
        chain: torch's list of its parametrizations; `parametrization` is the only one.
        lent: the Parameter; whoever lets a host replace it must say so here.
    """

    def __init__(self, ref: TensorRef, chain: parametrize.ParametrizationList) -> None:
        _refuse_foreign(ref)
        self.layer, self.module, self.tensor_name = ref.module_name, ref.module, ref.tensor_name
        self.chain: parametrize.ParametrizationList = chain
        self.parametrization: Mask = chain[0]  # type: ignore[assignment]
        self.cls, self.children = type(ref.module), parametrizations(ref.module)
        self.names = tuple(self.children)
        self.lent: nn.Parameter
        self.unit = True
        self._exact: Tensor | None = None
        self._exact_grad: Tensor | None = None
        self._scale: Tensor | None = None

    def is_held(self) -> bool:
        """Whether the tensor is under the parametrization that it was under, and nothing else."""
        module = self.module
        return (
            type(module) is self.cls
            and module._modules.get("parametrizations") is self.children
            and self.chain._parameters.get("original") is not None
            and len(self.chain) == 1
            and tuple(parametrizations(module)) == self.names
        )

    def begin(self, unit: bool) -> None:
        """Take the Parameter that there is; `unit`: whether it is to be shown in unit gauge."""
        held_there: Any = self.chain.original
        self.lent, self.unit = held_there, unit

    @property
    def parameter(self) -> nn.Parameter | None:
        """The Parameter that the module has by now."""
        return self.module._parameters.get(self.tensor_name)

    @torch.no_grad()
    def show(self) -> None:
        """Put what a host may read into the Parameter."""
        if self.unit:
            self._scale = _scale(self.parametrization, self.lent)
        if self._scale is not None or self.parametrization.mask is not None:
            self._exact = self.lent.data
            self.lent.data = self._shown(self._exact)
        if self._scale is not None and self.lent.grad is not None:
            exact: Tensor = self.lent.grad
            self._exact_grad, self.lent.grad = exact, exact / self._scale

    @torch.no_grad()
    def conceal(self) -> None:
        """Put the exact values back; what was written meanwhile is scaled back."""
        scale = 1 if self._scale is None else self._scale
        if self._exact is not None:
            _take_back(self.lent.data, self._exact, self._shown, lambda now: now / scale)
            self.lent.data = self._exact
        if self._scale is not None and self.lent.grad is not None:
            if self._exact_grad is None:
                self.lent.grad = self.lent.grad * scale
            else:
                _take_back(self.lent.grad, self._exact_grad, lambda grad, _: grad / scale, lambda now: now * scale)
                self.lent.grad = self._exact_grad
        self._exact = self._exact_grad = self._scale = None

    def composed(self) -> Tensor:
        """The kernels that the values in the Parameter make, as they are now."""
        space, values = self.parametrization, self.lent.detach()
        if not isinstance(space, Interspace):
            return values
        basis = space.effective_basis.detach()
        if self._scale is not None:  # the filters have unit norm where the coefficients are shown scaled
            norms = self._scale.reshape(-1, 1)
            basis = torch.where(norms > 0, basis / norms, 0)
        return bases.compose(values, basis)

    def _shown(self, values: Tensor, rows: Rows = ...) -> Tensor:
        scaled = values.clone() if self._scale is None else values * self._scale
        mask = self.parametrization.mask
        return scaled if mask is None else scaled.mul_(mask[rows])


_LENT: WeakKeyDictionary[nn.Module, list[Loan]] = WeakKeyDictionary()


def kernels(module: nn.Module) -> Tensor:
    """The kernels of a layer; those of one that is lent, whose ``weight`` is coefficients, are composed."""
    for loan in _LENT.get(module, ()):
        if loan.tensor_name == "weight":
            return loan.composed()
    found: Tensor = module.weight  # type: ignore[assignment]
    return found.detach()


def _take_back(
    now: Tensor, exact: Tensor, shown: Callable[[Tensor, Rows], Tensor], back: Callable[[Tensor], Tensor]
) -> None:
    """Write into `exact` what is not as it was shown; by rows, as most of it is, and nothing large is allocated."""
    rows: Iterable[Rows] = (...,)
    if exact.dim() and exact.numel() > _COMPARED_AT_ONCE:
        step = max(1, _COMPARED_AT_ONCE * len(exact) // exact.numel())
        rows = (slice(start, start + step) for start in range(0, len(exact), step))
    for some in rows:
        was = shown(exact[some], some)
        if not torch.equal(now[some], was):
            exact[some] = torch.where(now[some] == was, exact[some], back(now[some]))


def _scale(parametrization: nn.Module, coefficients: Tensor) -> Tensor | None:
    """What coefficients are multiplied by to be in unit gauge; None where that is one, to rounding."""
    norms = parametrization.filter_norms if isinstance(parametrization, Interspace) else None
    if norms is None or bool(((norms - 1).abs() <= 8 * torch.finfo(norms.dtype).eps).all()):
        return None
    return norms.reshape(1, 1, *coefficients.shape[2:])


def take_over_masks(modules: Iterable[nn.Module]) -> None:
    """Make every mask that `torch.nn.utils.prune` has put on tensors of some modules ours."""
    for module in modules:
        if TensorRef(module).is_foreign or isinstance(
            module, nn.RNNBase
        ):  # torch keeps the weights of these in a list, too
            continue
        for name in torch_masks.pruned_names(module):
            kept = torch_masks.take_off(module, name)
            assert kept is not None
            TensorRef(module, name).add_mask(kept)


def _refuse_foreign(ref: TensorRef) -> None:
    for tensor_name, chain in parametrizations(ref.module).items():
        others = [parametrization for parametrization in chain if not isinstance(parametrization, Mask)]
        if others:
            raise AlreadyParametrizedError.beside_ours(ref.module_name, others, tensor_name)


def _make_plain(module: nn.Module, loans: list[Loan]) -> None:
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for loan in loans:
        module.register_parameter(loan.tensor_name, loan.lent)
    restore_order(module, loans[0].parametrization.order)
    _LENT[module] = loans


def _give_back(module: nn.Module, loans: list[Loan]) -> None:
    _LENT.pop(module, None)
    for loan in loans:
        loan.chain.register_parameter("original", loan.lent)
        module._parameters.pop(loan.tensor_name, None)
    module.__class__ = loans[0].cls
    module._modules["parametrizations"] = loans[0].children
