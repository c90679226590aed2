"""The two parametrizations of this package, `Interspace` and `Mask`; `enter` registers one, `leave` removes it.

`Interspace` composes a convolution's weight from coefficients and a basis; `Mask` only masks, for spatial tensors. Both
keep the Parameter object of the tensor, so that an existing optimizer goes on training it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..basis import bases
from ..basis.bases import CONSTRAINTS, Constraint
from ..errors import MaskError
from . import shared_basis
from .composed_weight import make_writable
from .mask_tensor import MaskTensor


class Mask(nn.Module):
    """Multiplies a tensor by a bool mask; the identity while the mask keeps everything.

    The mask is there before anything is pruned, so pruning changes neither the buffers of a model nor the keys of its
    ``state_dict``. Nothing is multiplied while it is known to keep everything: since `set_mask`, nobody has written it.

    Attributes:
        mask: bool buffer of the tensor's shape, False = pruned; None until `enter` has registered the parametrization.
        is_set: whether a mask has been set, even one that keeps everything.
        is_applied: False while the tensor is wanted without its mask.
    """

    mask: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)
        self.order: tuple[str, ...] = ()
        self.load_hook: RemovableHandle | None = None
        self.is_set = False
        self.is_applied = True
        self._bools: Tensor | None = None  # the mask as an ordinary tensor, which compilers understand
        self._seen: tuple[Tensor, int | None, bool] | None = None  # the mask, its version, whether it kept everything

    @property
    def kept(self) -> Tensor | None:
        """The mask as an ordinary tensor; None if nobody has set one and it keeps everything."""
        self._look()
        return None if self._seen is None or (self._seen[2] and not self.is_set) else self._bools

    @torch.no_grad()
    def set_mask(self, mask: Tensor | None, like: Tensor) -> None:
        """Write the mask, in place where its shape stays; None takes it away: everything is kept.

        Args:
            mask: bool, of the shape of `like`.
            like: the masked tensor, in whose memory format a new mask is, so that masking needs no reordering.
        """
        if self.mask is None or self.mask.shape != like.shape or self.mask.device != like.device:
            self.mask = torch.empty_like(like, dtype=torch.bool, requires_grad=False)
        self.mask.fill_(True) if mask is None else self.mask.copy_(mask)
        self.is_set = mask is not None
        self._look()

    def _is_known_to_keep_all(self) -> bool:
        if self._seen is None or self._bools is None or self._seen[0] is not self._buffers["mask"]:
            return False
        _, version, all_kept = self._seen
        return all_kept and version is not None and version == self._bools._version and not _may_receive_masks()

    def _look(self) -> None:
        """Remember whether the mask keeps everything."""
        if self.mask is None or self._seen is None or self._seen[0] is not self.mask:
            self._bools = self._seen = None
        if self.mask is None or type(self.mask) not in (Tensor, MaskTensor):  # while torch traces, they are of others
            self._bools = self.mask
            return
        if self._bools is None:
            self.mask = self.mask.as_subclass(MaskTensor)
            self._bools = self.mask.as_subclass(Tensor)
        version = None if self.mask.is_inference() else self.mask._version
        if self._seen is None or version is None or version != self._seen[1] or _may_receive_masks():
            self._seen = self.mask, version, self.mask.is_meta or bool(self._bools.all())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mask:
        was_meta = self.mask is not None and self.mask.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mask is not None and was_meta and not self.mask.is_meta:
            self.mask.fill_(True)  # `to_empty` has left it uninitialised
        self._look()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bools": None, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._look()

    def forward(self, original: Tensor) -> Tensor:
        """The masked tensor; a masked entry passes no gradient."""
        if self.mask is None or not self.is_applied:
            return original
        if torch.compiler.is_compiling():  # multiply always, so that the first pruning needs no new compilation
            return original if self._bools is None else original * self._bools
        if self._is_known_to_keep_all():
            return original
        # On a CPU the product by int8 takes half the time; `torch.jit.trace` cannot view bools as int8.
        is_tracing = torch._C._get_tracing_state() is not None
        return original * (self.mask if is_tracing else self.mask.view(torch.int8))

    def right_inverse(self, value: Tensor) -> Tensor:
        """The `original` for which `forward` returns `value`, except for pruned entries."""
        return value.clone()

    def extra_repr(self) -> str:
        """The number of pruned entries, for ``print(model)``."""
        mask = self.kept
        return "" if mask is None else f"pruned={int(mask.numel() - mask.sum())}/{mask.numel()}"

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._look()


def _may_receive_masks() -> bool:
    """Whether DistributedDataParallel may write into masks: it hides that from the version counters of buffers."""
    return dist.is_available() and dist.is_initialized()


class Interspace(Mask):
    """Composes kernels from masked coefficients and a filter basis.

    After Wimmer, Mehnert and Condurache, CVPR 2022 (arXiv 2203.07808).

    Args:
        basis: Parameter ``(N, N)``, one filter per row; layers may share the object.
        kernel: spatial shape of the kernels, ``prod(kernel) == N``.
        constraint: applied to `basis` whenever kernels are composed; see `ip_plugin.basis.constrained`. Part of the
            ``state_dict``, but no buffer: it is not cast or averaged.

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
        """The constraint as a number, for the ``state_dict``."""
        return torch.tensor(CONSTRAINTS.index(self.constraint), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the constraint from a ``state_dict``."""
        self.constraint = CONSTRAINTS[int(state)]

    @property
    def effective_basis(self) -> Tensor:
        """The filters that kernels are composed of, ``(N, N)``: `basis` under the constraint, differentiable."""
        return bases.constrained(self.basis, self.constraint)

    @property
    def filters(self) -> Tensor:
        """The effective basis in the shape of kernels, ``(N, *kernel)``."""
        return self.effective_basis.detach().reshape(-1, *self.kernel)

    @property
    def filter_norms(self) -> Tensor | None:
        """The norms of the filters, ``(N,)``; None if the constraint makes them 1."""
        return bases.norms(self.basis.detach()) if self.constraint == "none" else None

    def forward(self, original: Tensor) -> Tensor:
        """Weights ``(out, in, *kernel)`` from coefficients of the same shape."""
        if torch.is_autocast_enabled(original.device.type):
            # Compose in the precision of the coefficients; the convolution rounds the weight once.
            with torch.autocast(original.device.type, enabled=False):
                return bases.compose(super().forward(original), self.effective_basis)
        return bases.compose(super().forward(original), self.effective_basis)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Coefficients of the kernels `value` in the present basis."""
        return bases.transform_(value.detach().clone(), bases.inverse(self.effective_basis))

    def extra_repr(self) -> str:
        """The basis and the number of pruned entries, for ``print(model)``."""
        kernel = "x".join(map(str, self.kernel))
        constraint = "" if self.constraint == "none" else f", constraint={self.constraint}"
        frozen = "" if self.basis.requires_grad else ", frozen"
        basis = f"kernel={kernel}, basis={len(self.basis)} filters{constraint}{frozen}"
        return ", ".join(filter(None, (basis, super().extra_repr())))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # `keep_vars` hands on the Parameters themselves; torch.export looks for a shared one under each of its keys.
        stored = not keep_vars and shared_basis.is_stored(self.basis, destination)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if stored:
            del destination[f"{prefix}basis"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # `load_state_dict(assign=True)` would untie a shared basis: copy the values instead, unless the model is on the
        # meta device and has no memory to copy to.
        if not self.basis.is_meta:
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        basis, key = self.basis, f"{prefix}basis"
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        shared_basis.note_load(self, basis, key, key in state_dict, args[1])


def parametrizations(module: nn.Module) -> Any:
    """The ModuleDict of torch's parametrizations: tensor name -> ParametrizationList."""
    return module.parametrizations


def enter(module: nn.Module, tensor_name: str, parametrization: Mask, *, hook: bool = True) -> None:
    """Put a Parameter of `module` under `parametrization`: same object, same storage, same values.

    Inverse: `leave`.

    Args:
        module: owner of the Parameter.
        tensor_name: its name.
        parametrization: gets a mask that keeps everything if it has none.
        hook: False if `adapt_loading` has been called for the module before.
    """
    parametrization.order = order(module)
    parametrization.train(module.training)
    if parametrize.is_parametrized(module):
        _own_class(module)
    parameter = module._parameters[tensor_name]
    assert parameter is not None
    # Torch calls `set_` on the registered Parameter, which would disconnect it from its hooks, among them those of
    # DistributedDataParallel. So register a placeholder, and a module without `right_inverse`.
    module._parameters[tensor_name] = nn.Parameter(parameter.detach().new_empty(0), parameter.requires_grad)
    parametrize.register_parametrization(module, tensor_name, nn.Identity(), unsafe=True)
    chain = parametrizations(module)[tensor_name]
    chain.original = parameter
    chain[0] = parametrization
    if parametrization.mask is None:
        parametrization.set_mask(None, parameter)
    make_writable(module, tensor_name)
    _make_picklable(type(module))
    type(module).register_parameter = _register_parameter  # type: ignore[method-assign, assignment]
    if hook:
        parametrization.load_hook = adapt_loading(module)


def _register_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Remove a mask that keeps everything when `torch.nn.utils.prune` is called for the layer itself.

    Its functions rename the Parameter, which must be the layer's own for that.
    """
    plain_class: Any = type(module).__bases__[0]
    tensor_name = name.removesuffix("_orig")
    if name != tensor_name and parametrize.is_parametrized(module, tensor_name):
        chain: Any = parametrizations(module)[tensor_name]
        if isinstance(chain[0], Interspace) or chain[0].kept is not None:
            raise MaskError(
                "PyTorch's pruning functions act on Parameters.",
                f"{tensor_name!r} of a {plain_class.__name__}, which is computed from coefficients or a mask",
                "prune the targets that ip_plugin.prunable(model) lists, or write "
                "`from ip_plugin.adapters import torch_prune as prune` instead of `from torch.nn.utils import prune`",
            )
        chain[0].load_hook = None  # the hook stays, for the state dicts of models in which this layer has its mask
        parameter = chain.original
        leave(module, tensor_name, chain.original.detach())
    plain_class.register_parameter(module, name, parameter)


@torch.no_grad()
def leave(module: nn.Module, tensor_name: str, value: Tensor) -> None:
    """Make a parametrized tensor an ordinary Parameter with the given value: the same object, in its old order.

    Replaces `torch.nn.utils.parametrize.remove_parametrizations`, which deletes the property from a class that copies
    of the module share, and registers the parameter last. Inverse: `enter`.
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
    if isinstance(module, nn.RNNBase):  # replaces the computed tensors in the list that these modules keep, too
        module._init_flat_weights()


def _own_class(module: nn.Module, without: str = "") -> None:
    """Give a parametrized module a class that its copies do not share, so that a property can be added or removed."""
    cls = type(module)
    kept = {k: v for k, v in vars(cls).items() if k not in (without, "__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, kept)


def _make_picklable(cls: Any) -> None:
    """Let modules of a class that torch's `register_parametrization` has made be pickled; torch refuses them.

    Only a computed class cannot be pickled. So a module is pickled as its plain class with all that it has.
    """
    if "__getstate__" in vars(cls):  # raises
        del cls.__getstate__
    cls.__reduce_ex__ = _reduce


def _reduce(module: nn.Module, protocol: object) -> tuple[Any, ...]:  # noqa: ARG001
    getstate = getattr(module, "__getstate__", None)  # Python 3.10 has no `object.__getstate__`
    ours = {name: isinstance(tensors[0], Mask) for name, tensors in parametrizations(module).items()}
    return _rebuilt, (type(module).__bases__[0], ours), module.__dict__ if getstate is None else getstate()


def _rebuilt(plain: type[nn.Module], tensors: dict[str, bool]) -> nn.Module:
    """A module with computed tensors, {name: whether it is under a parametrization of ours}; still without a state."""
    module = plain.__new__(plain)
    nn.Module.__init__(module)
    for tensor_name, ours in tensors.items():
        module.register_parameter(tensor_name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, tensor_name, nn.Identity(), unsafe=True)
        if ours:
            make_writable(module, tensor_name)
    _make_picklable(type(module))
    return module


def order(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of `module` in the order of registration, including parametrized ones."""
    if parametrize.is_parametrized(module):
        for tensors in parametrizations(module).values():
            if isinstance(tensors[0], Mask):
                return tensors[0].order
    return tuple(module._parameters)


def restore_order(module: nn.Module, names: Sequence[str]) -> None:
    """Sort the parameters of `module` (not of its children) in the order of `names`; others follow."""
    ranks = {name: rank for rank, name in enumerate(names)}
    for name in sorted(module._parameters, key=lambda n: ranks.get(n, len(ranks))):
        module._parameters[name] = module._parameters.pop(name)


def adapt_loading(module: nn.Module) -> RemovableHandle:
    """Let a layer load what any model of the architecture has saved, pruned or not, in either space."""
    handle: RemovableHandle = module.register_load_state_dict_pre_hook(_prepare_loading)
    return handle


def _prepare_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Adapt a ``state_dict`` to a layer: convert the weight of a plain model, allocate a mask, or rename tensors.

    The plain model may have been pruned by `torch.nn.utils.prune`; its mask is adopted if coefficients equal weights.
    """
    error_messages: list[str] = rest[-1]  # the last argument of torch's hook
    for name in list(module._parameters):
        key, tensor_name = f"{prefix}parametrizations.{name.removesuffix('_orig')}", name.removesuffix("_orig")
        if f"{key}.original" not in state_dict or f"{key}.0.basis" in state_dict:
            continue
        if name == tensor_name:  # no mask yet
            enter(module, name, Mask(), hook=False)
        else:  # pruned by torch.nn.utils.prune
            state_dict[f"{prefix}{name}"] = state_dict.pop(f"{key}.original")
            mask = state_dict.pop(f"{key}.0.mask", getattr(module, f"{tensor_name}_mask"))
            state_dict[f"{prefix}{tensor_name}_mask"] = mask
    if not parametrize.is_parametrized(module):
        return
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
                    f"{plain} was pruned by torch.nn.utils.prune, and a mask of weights does not apply to coefficients "
                    "in a basis other than the standard one: load it into the plain model, make its zeros permanent "
                    "with ip_plugin.bake(model), and then call ip_plugin.interspace(model)"
                )
        if f"{key}.0.basis" in state_dict and f"{key}.0._extra_state" not in state_dict:
            # Saved by a version without constraints.
            state_dict[f"{key}.0._extra_state"] = torch.tensor(CONSTRAINTS.index("none"))
        dense = state_dict.pop(plain, None)
        if dense is None:
            if f"{key}.original" in state_dict and parametrization.kept is None:  # saved without a mask
                mask = torch.ones_like(state_dict[f"{key}.original"], dtype=torch.bool)
                state_dict.setdefault(f"{key}.0.mask", mask)
            continue
        # The plain model has no bases and masks: keep the present ones.
        if parametrization.mask is not None and parametrization.mask.is_meta:
            state_dict.setdefault(f"{key}.0.mask", torch.ones_like(dense, dtype=torch.bool))
        for name, tensor in tensors.state_dict(prefix=f"{key}.").items():
            state_dict.setdefault(name, tensor)
        if dense.shape == shape:
            try:
                dense = parametrization.right_inverse(dense.to(tensors.original.device))
            except ValueError as error:
                error_messages.append(f"{plain} cannot be written in its basis: {error}")
        pruned_by_host = "original" not in tensors._parameters
        state_dict[f"{key}.original_orig" if pruned_by_host else f"{key}.original"] = dense
