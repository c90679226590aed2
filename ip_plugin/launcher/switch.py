"""Switch code that knows nothing of the interspace to it, and back: `switch_on`, `switch_off`, `switched_on`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from ..basis.bases import BasisSpec, Constraint
from ..errors import HostError
from . import libraries, saving
from .patches import Patches
from .session import Options, Session

_active: tuple[Session, Patches] | None = None


def switch_on(
    *,
    basis: BasisSpec = "standard",
    sharing: Literal["layer", "model"] = "layer",
    constraint: Constraint = "unit",
    space: Literal["interspace", "spatial"] = "interspace",
    convert_at: Literal["start", "pruning"] = "start",
    layers: Sequence[str] = (),
    quiet: bool = False,
) -> Session:
    """Let whatever trains and prunes from now on do so in the interspace, without a change to its code.

    Models are converted when an optimizer is built for them (``convert_at="start"``), or when a library is about to
    prune them (``"pruning"``); their bases join every optimizer that has their coefficients. ``torch.nn.utils.prune``,
    Torch-Pruning, NNI and Lightning's `ModelPruning` act on coefficients, however they are imported. What
    ``torch.save`` writes loads into the plain network; loaded again while switched on, it restores coefficients, bases
    and masks exactly. ``torch.onnx.export``, ``torch.jit.trace`` and ``torch.jit.script`` get a baked copy.

    Names that a module has imported before are exchanged, too, except where they were put into a data structure.

    Args:
        basis, sharing, constraint: see `ip_plugin.interspace`.
        space: ``"spatial"`` converts nothing: the control run, with the same lines at the end.
        convert_at: ``"start"`` or ``"pruning"``.
        layers: patterns of names, such as ``"layer1.*"``; none selects every convolution.
        quiet: print nothing.

    Returns:
        The session; `switch_off` ends it.

    Raises:
        HostError: it is switched on already.
        ArgumentError, BasisError: an option is not understood.

    >>> import torch
    >>> import ip_plugin
    >>> from torch.nn.utils import prune
    >>> session = ip_plugin.switch_on(quiet=True)
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> from torch.nn.utils import prune
    >>> _ = prune.l1_unstructured(model[0], "weight", amount=0.5)
    >>> ip_plugin.switch_off()
    >>> ip_plugin.report(model).rows[0].space, ip_plugin.report(model).rows[0].nonzeros
    ('interspace', 18)
    """
    global _active
    if _active is not None:
        raise HostError(
            "The interspace can be switched on once at a time.",
            "it is switched on already",
            "call ip_plugin.switch_off() first, and start one `ip-plugin run` only",
        )
    session = Session(Options(space, basis, sharing, constraint, convert_at, tuple(layers), quiet))
    patches = Patches()
    try:
        _patch_torch(session, patches)
        if space == "interspace":
            libraries.patch(session, patches)
    except BaseException:
        patches.undo()
        raise
    _active = session, patches
    return session


def switch_off() -> None:
    """Undo what `switch_on` has changed in torch and the libraries; models that were converted stay so.

    Without a session it does nothing.

    >>> import ip_plugin
    >>> session = ip_plugin.switch_on(quiet=True)
    >>> ip_plugin.switch_off()
    """
    global _active
    if _active is not None:
        (_, patches), _active = _active, None
        patches.undo()


@contextmanager
def switched_on(**options: Any) -> Iterator[Session]:
    """`switch_on` while the block runs; takes its arguments, and prints the sparsity of the models in the end.

    >>> import torch
    >>> import ip_plugin
    >>> with ip_plugin.switched_on(basis="dct", quiet=True):
    ...     model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3))
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model[0].parametrizations.weight[0].filters.shape
    torch.Size([9, 3, 3])
    """
    session = switch_on(**options)
    try:
        yield session
        session.finish()
    finally:
        switch_off()


def _patch_torch(session: Session, patches: Patches) -> None:
    start = session.options.convert_at == "start" or session.options.space == "spatial"
    built = Optimizer.__init__

    def build(self: Optimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        params, parameters = _listed(params)
        if start:
            session.convert_owners(parameters)
        built(self, params, *args, **kwargs)
        if session.options.space == "interspace":
            session.join(self)
            session.arrange(self)

    patches.set(Optimizer, "__init__", build)
    if session.options.space == "spatial":
        return

    def wrapping(wrapper: type[nn.Module]) -> None:
        wrap = wrapper.__init__

        def build(self: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            session.convert(model)
            wrap(self, model, *args, **kwargs)

        patches.set(wrapper, "__init__", build)

    if start:  # a wrapper lists or copies parameters: bases must be among them
        for wrapper in (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel):
            wrapping(wrapper)

    def before_step(optimizer: Optimizer, *_: object) -> None:
        if not torch.compiler.is_compiling():
            session.before_step(optimizer)

    patches.defer(register_optimizer_step_pre_hook(before_step).remove)
    save, load = torch.save, nn.Module.load_state_dict

    def torch_save(obj: object, *args: Any, **kwargs: Any) -> None:
        session.flush()
        save(saving.ordinary(obj), *args, **kwargs)

    patches.replace({save: torch_save})
    patches.set(nn.Module, "load_state_dict", saving.loading(session, load))
    for module_name, name in (("torch.onnx", "export"), ("torch.jit", "trace"), ("torch.jit", "script")):
        patches.when_imported(module_name, partial(_export_baked, patches, name))


def _listed(params: Any) -> tuple[Any, list[Tensor]]:
    """An optimizer's first argument with its iterators used up, and the Parameters in it."""
    if isinstance(params, Tensor):
        return params, []  # refused by torch
    params = list(params)
    found: list[Tensor] = []
    for item in params:
        if isinstance(item, dict):
            if not isinstance(item["params"], Tensor):
                item["params"] = list(item["params"])
            inner = [item["params"]] if isinstance(item["params"], Tensor) else item["params"]
        else:
            inner = [item]
        found += [each[1] if isinstance(each, tuple) else each for each in inner]
    return params, found


def _export_baked(patches: Patches, name: str, module: ModuleType) -> None:
    """Let a function that exports its first argument get a baked copy of a converted model."""
    export = getattr(module, name)

    def exported(model: Any, *args: Any, **kwargs: Any) -> Any:
        return export(saving.ordinary(model) if isinstance(model, nn.Module) else model, *args, **kwargs)

    patches.set(module, name, exported)
