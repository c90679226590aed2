"""`prepare`: make a sparse network of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import ArgumentError, SparseExecutionError, SparseFallbackWarning
from ..reporting.measure import PREPARED, Prepared, measure
from ..utils.example_input import arguments, run
from .autotune import Autotuner, Chooser, by_rule
from .dense import faster_dense
from .graph import Outputs, Structure, UntraceableError, baked, outputs_of, trace
from .network import SparseNetwork, check_input
from .threads import warn_of_slow_threads

#: How much outputs may differ from the model's, relative to the largest one, by dtype of responses.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def prepare(
    model: nn.Module,
    example_input: Any,
    *,
    deterministic: bool = False,
    response_dtype: torch.dtype = torch.float32,
    dense: Literal["auto", "torch"] = "auto",
) -> nn.Module:
    """Make a network for inference on a CPU that computes the same outputs, skipping zeros where that is faster.

    2D convolutions and linear layers run sparse, in either space, fused with what follows them (BatchNorm, addition of
    a residual, activation); pooling, concatenation and squeeze-and-excitation run in the same memory layout. Autotuning
    times each convolution dense and in several sparse ways. 3x3 convolutions that are still too dense for the sparse
    kernels may run dense by Winograd's minimal filtering (Lavin and Gray 2016, arXiv 1509.09308), where a NaN or
    infinity spreads over its tile of 4x4 pixels. Everything else is left to torch.

    What is prepared is run on the example input and compared with the model. If `torch.fx` cannot trace the forward, or
    traces another branch of it, as large parts of the model as possible are prepared instead, down to single
    convolutions, with a warning.

    Args:
        model: pruned, in either space, float32 on the CPU; not changed, and not needed afterwards.
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments. What is no tensor in it is
            fixed; other shapes of tensors are prepared for when they first occur.
        deterministic: choose by a rule instead of by timing: slower, but outputs are bit-equal in every process.
        response_dtype: dtype in which basis-filter responses are stored while a layer runs: float32, or bfloat16, which
            halves their cache footprint and rounds them to 8 bits; sums and everything else stay float32.
        dense: by what a network may be run as a whole where that is faster: ``"torch"``, or, if ``"auto"``, ONNX
            Runtime and OpenVINO as well, where they are installed. ``network.dense`` says whether it is. With
            `deterministic` it never is.

    Returns:
        A module that takes what the model takes, without gradients: a `SparseNetwork`, or a copy of the model, parts of
        which run sparse. It describes itself to `ip_plugin.report`.

    Raises:
        BatchError: the model does not run on the example input.
        ArgumentError: `response_dtype` is another type, or `dense` another word.
        SparseExecutionError: model or input are not float32 on the CPU, or the model cannot be copied, or a baked copy
            computes something else.

    Warns:
        SparseFallbackWarning: the model is run in parts, or threads are slow.

    >>> import torch
    >>> from ip_plugin.methods import prune_fitted
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> model = prune_fitted(model.eval(), sparsity=0.9)
    >>> images = torch.randn(1, 3, 12, 12)
    >>> network = prepare(model, images)
    >>> bool((network(images) - model(images)).abs().max() < 1e-5)
    True
    """
    if response_dtype not in (torch.float32, torch.bfloat16):
        raise ArgumentError(
            "`response_dtype` must be torch.float32 or torch.bfloat16.",
            f"response_dtype={response_dtype}",
            "leave it out for results that are exact to float32",
        )
    if dense not in ("auto", "torch"):
        raise ArgumentError("`dense` must be 'auto' or 'torch'.", f"dense={dense!r}", "leave it out for 'auto'")
    args, kwargs = arguments(example_input)
    structure, tensors = Structure.of(args, kwargs)
    for value in (*tensors, *(parameter.detach() for parameter in model.parameters())):
        check_input(value)
    expected = outputs_of(lambda *args, **kwargs: run(model, kwargs or args), structure, tensors)
    choose: Chooser = Autotuner(response_dtype)
    if deterministic:
        choose = partial(by_rule, response_dtype=response_dtype)
    parts = _Parts(model, choose, _TOLERANCES[response_dtype])
    prepared: nn.Module
    try:
        prepared = parts.network(parts.plain, args, kwargs, expected)
        networks, by_torch = [prepared], prepared.layers_by_torch()
        if not deterministic and any(run.how != "dense" for run in prepared.runs(*args, **kwargs)):
            prepared.dense = faster_dense(
                prepared, parts.plain, structure, tensors, _TOLERANCES[torch.float32], dense == "auto"
            )
    except UntraceableError as error:
        prepared, networks, by_torch = parts.plain, *parts.assemble(args, kwargs, expected)
        sparse = len(
            {call.layer for network in networks for call in network.first_calls()} & {*parts.convolutions.values()}
        )
        how, reason = "in parts, which is slower" if networks else "dense", str(error).rstrip(".")
        warnings.warn(
            f"The network is run {how}: torch.fx cannot trace its forward as a whole. Found: {reason}. {len(networks)} "
            f"parts are sparse networks, with {sparse} of {len(parts.convolutions)} convolutions for which there "
            f"are loops{parts.difference}. What to do: keep Python that depends on values or types of tensors out of "
            "the forward, or accept the speed",
            SparseFallbackWarning,
            stacklevel=2,
        )
    warn_of_slow_threads(stacklevel=3)
    setattr(prepared, PREPARED, Prepared(measure(model, packing=False), by_torch, networks))
    return prepared


class _Parts:
    """Makes sparse networks of a model or its parts.

    Args:
        model, choose: as of `prepare`.
        tolerance: how much outputs may differ from the model's, relative to the largest.

    Attributes:
        plain: a baked copy of the model.
        convolutions: names of those that can run sparse.
        difference: in words, what `assemble` has found different in the outputs of the whole model.
    """

    def __init__(self, model: nn.Module, choose: Chooser, tolerance: float) -> None:
        self.plain, self._sparse = baked(model)
        layers = self._sparse.items()
        self.convolutions = {m: ref.module_name for m, ref in layers if isinstance(m, nn.Conv2d)}
        self.difference = ""
        self._choose, self._tolerance = choose, tolerance

    def network(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Outputs | None = None
    ) -> SparseNetwork:
        """A network that computes what `module` does for these arguments, or `expected`.

        Raises:
            UntraceableError: there is none.
        """
        structure, tensors = Structure.of(args, kwargs)
        expected = expected or outputs_of(module, structure, tensors)
        errors = []
        for opaque in (False, True):
            try:
                traced = trace(
                    module, self._sparse, args, kwargs, expected=expected, opaque=opaque, tolerance=self._tolerance
                )
                network = SparseNetwork(traced, self._choose, module.forward).eval()
                difference = expected.difference(outputs_of(network, structure, tensors), self._tolerance)
            except UntraceableError as failure:  # noqa: PERF203
                errors.append(failure)
            except Exception as failure:
                errors.append(UntraceableError(f"{type(failure).__name__}: {failure}".splitlines()[0]))
            else:
                if not difference:
                    return network
                errors.append(UntraceableError(f"run sparse, it computes something else: {difference}"))
        raise errors[0]

    def assemble(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Outputs
    ) -> tuple[list[SparseNetwork], dict[str, nn.Module]]:
        """Let parts of `plain` run sparse where they are called as they were for these arguments.

        Modules keep their classes and attributes, so that a forward that asks for them finds what it expects.

        Args:
            args, kwargs: of a call.
            expected: the outputs of the model.

        Returns:
            The networks, and all modules that torch may run, by name.

        Raises:
            SparseExecutionError: `plain` computes something else than the model.
        """
        structure, tensors = Structure.of(args, kwargs)
        difference = expected.difference(outputs_of(self.plain, structure, tensors), self._tolerance)
        if difference:
            raise SparseExecutionError(
                "A model that is prepared must compute the same when it is baked.",
                difference,
                "do not prune a weight that another layer uses, too, like that of an output layer that is tied to an "
                "embedding; or untie them",
            )
        networks = dict(self._inside(self.plain, args, kwargs))
        for module, network in networks.items():
            module.forward = _or_dense(network, module.forward)
        outputs = outputs_of(self.plain, structure, tensors)
        self.difference = expected.difference(outputs, self._tolerance)
        if self.difference:
            self.difference = (
                f"; the outputs of each part are the model's, but together {self.difference}, as where a small "
                "difference decides what is kept (non-maximum suppression): check outputs on your data"
            )
        return list(networks.values()), dict(self.plain.named_modules())

    def _inside(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[nn.Module, SparseNetwork]]:
        """Networks for the largest parts of a module that there are networks for."""
        for part, (part_args, part_kwargs) in self._calls_inside(module, args, kwargs).items():
            try:
                network = self.network(part, part_args, part_kwargs)
            except UntraceableError:  # noqa: PERF203
                yield from self._inside(part, part_args, part_kwargs)
            else:
                if network.first_calls():
                    yield part, network

    def _calls_inside(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
        """The first calls of parts with layers that can run sparse, but not calls from inside of these parts."""
        calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        inside: list[nn.Module] = []

        def enter(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not inside:
                calls.setdefault(part, (args, kwargs))
            inside.append(part)

        def leave(*_: Any) -> None:
            inside.pop()

        hooks: list[RemovableHandle] = []
        for part in module.modules():
            hooked = part._forward_hooks or part._forward_pre_hooks
            if part is not module and not hooked and not self.convolutions.keys().isdisjoint(part.modules()):
                hooks.append(part.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.append(part.register_forward_hook(leave, always_call=True))
        structure, tensors = Structure.of(args, kwargs)
        try:
            outputs_of(module, structure, tensors)
        finally:
            for hook in hooks:
                hook.remove()
        return calls


def _or_dense(network: SparseNetwork, dense: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that runs a network, or the dense layers for calls that it is not prepared for."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return network(*args, **kwargs)
        except SparseExecutionError:
            return dense(*args, **kwargs)

    return forward
