"""The two parametrizations of this package, and how a tensor gets under one and out again.

`Interspace` composes a convolution's weight from coefficients and a basis; `Mask` only masks, for tensors that stay
spatial. Both keep the tensor's own Parameter object, so that an optimizer built before goes on training it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..basis import bases
from ..basis.bases import CONSTRAINTS, Constraint
from .composed_weight import serve


class Mask(nn.Module):
    """Multiplies a tensor by a bool mask; without a mask it is the identity.

    Attributes:
        mask: bool buffer of the tensor's shape, False = pruned; None = nothing is pruned.
    """

    mask: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)
        self.order: tuple[str, ...] = ()
        self.load_hook: RemovableHandle | None = None

    def forward(self, original: Tensor) -> Tensor:
        """The masked tensor; a masked entry passes no gradient."""
        if self.mask is None:
            return original
        # As int8: on a CPU the product of a float and a bool tensor takes twice as long, unless it is compiled (and
        # the compiler of torch 2.5 cannot view a bool as int8).
        return original * (self.mask if torch.compiler.is_compiling() else self.mask.view(torch.int8))

    def right_inverse(self, value: Tensor) -> Tensor:
        """What `original` must be for `forward` to give `value` (its pruned entries excepted)."""
        return value.clone()

    def extra_repr(self) -> str:
        """How much is pruned, for ``print(model)``."""
        if self.mask is None:
            return ""
        return f"pruned={int(self.mask.numel() - self.mask.sum())}/{self.mask.numel()}"


class Interspace(Mask):
    """Composes kernels from masked coefficients and a filter basis.

    After Wimmer, Mehnert and Condurache, CVPR 2022 (arXiv 2203.07808).

    Args:
        basis: Parameter ``(N, N)``, one filter a row; layers may share the object.
        kernel: spatial shape of the kernels, ``prod(kernel) == N``.
        constraint: what holds of the filters that kernels are composed of, whatever `basis` is trained to; see
            `ip_plugin.basis.constrained`. Part of the ``state_dict``, but no buffer: it is not cast or averaged.

    >>> space = Interspace(nn.Parameter(torch.eye(9)), (3, 3))
    >>> space(torch.ones(8, 4, 3, 3)).shape, space.filters.shape
    (torch.Size([8, 4, 3, 3]), torch.Size([9, 3, 3]))
    """

    def __init__(self, basis: nn.Parameter, kernel: Sequence[int], constraint: Constraint = "none") -> None:
        super().__init__()
        self.basis = basis
        self.kernel = tuple(kernel)
        #: ``"none"``, ``"unit"`` or ``"orthonormal"``; layers that share a basis have one.
        self.constraint = constraint

    def get_extra_state(self) -> Tensor:
        """The constraint as a number."""
        return torch.tensor(CONSTRAINTS.index(self.constraint), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a constraint from a ``state_dict``."""
        self.constraint = CONSTRAINTS[int(state)]

    @property
    def effective_basis(self) -> Tensor:
        """What kernels are composed of, ``(N, N)``: `basis` under the constraint, differentiable in it."""
        return bases.constrained(self.basis, self.constraint)

    @property
    def filters(self) -> Tensor:
        """The effective basis as a person looks at it: ``(N, *kernel)``."""
        return self.effective_basis.detach().reshape(-1, *self.kernel)

    @property
    def filter_norms(self) -> Tensor | None:
        """The norms of the filters, ``(N,)``; None where the constraint makes them 1."""
        return bases.norms(self.basis.detach()) if self.constraint == "none" else None

    def forward(self, original: Tensor) -> Tensor:
        """Weights ``(out, in, *kernel)`` from coefficients of the same shape."""
        if torch.is_autocast_enabled(original.device.type):
            # In the coefficients' own precision: the convolution that uses the weight rounds it once.
            with torch.autocast(original.device.type, enabled=False):
                return bases.compose(super().forward(original), self.effective_basis)
        return bases.compose(super().forward(original), self.effective_basis)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Coefficients of the kernels `value` in the present basis."""
        return bases.transform_(value.detach().clone(), bases.inverse(self.effective_basis))

    def extra_repr(self) -> str:
        """The basis and how much is pruned, for ``print(model)``."""
        kernel = "x".join(map(str, self.kernel))
        constraint = "" if self.constraint == "none" else f", constraint={self.constraint}"
        frozen = "" if self.basis.requires_grad else ", frozen"
        basis = f"kernel={kernel}, basis={len(self.basis)} filters{constraint}{frozen}"
        return ", ".join(filter(None, (basis, super().extra_repr())))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # `load_state_dict(assign=True)` would give every layer a basis of its own: copy the values instead, unless
        # the model is on the meta device and has no memory to copy to.
        if not self.basis.is_meta:
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def parametrizations(module: nn.Module) -> Any:
    """The ModuleDict of torch's parametrizations: tensor name -> ParametrizationList."""
    return module.parametrizations


def enter(module: nn.Module, tensor_name: str, parametrization: Mask) -> None:
    """Put a Parameter of `module` under `parametrization`: same object, same storage, same values.

    Inverse: `leave`.
    """
    parametrization.order = order(module)
    parametrization.train(module.training)
    if parametrize.is_parametrized(module):
        _own_class(module)
    parameter = module._parameters[tensor_name]
    assert parameter is not None
    # Torch calls `set_` on what it registers, which would cut the Parameter off from its hooks, those of
    # DistributedDataParallel among them: so it gets another one, and a module without `right_inverse`.
    module._parameters[tensor_name] = nn.Parameter(parameter.detach().new_empty(0), parameter.requires_grad)
    parametrize.register_parametrization(module, tensor_name, nn.Identity(), unsafe=True)
    chain = parametrizations(module)[tensor_name]
    chain.original = parameter
    chain[0] = parametrization
    serve(module, tensor_name)
    parametrization.load_hook = module.register_load_state_dict_pre_hook(_prepare_loading)


@torch.no_grad()
def leave(module: nn.Module, tensor_name: str, value: Tensor) -> None:
    """Make a parametrized tensor an ordinary Parameter with the given value: the same object, at its old place.

    `torch.nn.utils.parametrize.remove_parametrizations` deletes the property from a class that copies of the module
    share, and puts the parameter last; so this does it without.
    """
    tensors = parametrizations(module)
    parameter: nn.Parameter = tensors[tensor_name].original
    parametrization = tensors[tensor_name][0]
    parameter.copy_(value)
    if parametrization.load_hook is not None:
        parametrization.load_hook.remove()
    if len(tensors) == 1:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    else:
        del tensors[tensor_name]
        _own_class(module, without=tensor_name)
    module.register_parameter(tensor_name, parameter)
    restore_order(module, parametrization.order)
    if isinstance(module, nn.RNNBase):  # torch keeps their weights in a list, too: there the computed ones still are
        module._init_flat_weights()


def _own_class(module: nn.Module, without: str = "") -> None:
    """Give a parametrized module a class that its copies do not share, before a property is added or left out."""
    cls = type(module)
    kept = {k: v for k, v in vars(cls).items() if k not in (without, "__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, kept)


def order(module: nn.Module) -> tuple[str, ...]:
    """The order in which the parameters of `module` were registered, those under our parametrizations included."""
    if parametrize.is_parametrized(module):
        for tensors in parametrizations(module).values():
            if isinstance(tensors[0], Mask):
                return tensors[0].order
    return tuple(module._parameters)


def restore_order(module: nn.Module, names: Sequence[str]) -> None:
    """Sort the parameters of `module` (not of its children) by `names`; the rest follows as it was."""
    place = {name: i for i, name in enumerate(names)}
    for name in sorted(module._parameters, key=lambda n: place.get(n, len(place))):
        module._parameters[name] = module._parameters.pop(name)


def _prepare_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a layer loads: make room for masks, and turn the weight of a plain model into coefficients.

    The plain model may have been pruned by `torch.nn.utils.prune`: its mask is ours where coefficients are weights.
    """
    error_messages: list[str] = rest[-1]  # the last argument of torch's hook
    for tensor_name, tensors in parametrizations(module).items():
        parametrization = tensors[0]
        if not isinstance(parametrization, Mask):
            continue
        key, plain = f"{prefix}parametrizations.{tensor_name}", prefix + tensor_name
        shape = tensors.original.shape
        kept = state_dict.pop(f"{plain}_mask", None) if f"{plain}_orig" in state_dict else None
        if kept is not None:
            state_dict[plain] = state_dict.pop(f"{plain}_orig")
            state_dict[f"{key}.0.mask"] = kept != 0
            if isinstance(parametrization, Interspace) and not bases.is_standard(parametrization.effective_basis):
                error_messages.append(
                    f"{plain} was pruned by torch.nn.utils.prune, and a mask of weights is none of coefficients in a "
                    "basis that is not the standard one: load it into the plain model, make its zeros permanent with "
                    "ip_plugin.bake(model), and call ip_plugin.interspace(model) then"
                )
        if f"{key}.0.basis" in state_dict and f"{key}.0._extra_state" not in state_dict:
            # Saved before there were constraints. The basis is what kernels were composed of.
            state_dict[f"{key}.0._extra_state"] = torch.tensor(CONSTRAINTS.index("none"))
        saved = state_dict.get(f"{key}.0.mask")
        if parametrization.mask is None and saved is not None and saved.shape == shape:
            parametrization.mask = torch.ones_like(tensors.original, dtype=torch.bool)
        dense = state_dict.pop(plain, None)
        if dense is None:
            continue
        # A plain model knows nothing of bases and masks: those that are there stay.
        for name, tensor in tensors.state_dict(prefix=f"{key}.").items():
            state_dict.setdefault(name, tensor)
        if dense.shape == shape:
            try:
                dense = parametrization.right_inverse(dense.to(tensors.original.device))
            except ValueError as error:
                error_messages.append(f"{plain} cannot be written in its basis: {error}")
        pruned_by_host = "original" not in tensors._parameters
        state_dict[f"{key}.original_orig" if pruned_by_host else f"{key}.original"] = dense
