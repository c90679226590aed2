"""`prepare`: make a sparse network of a model."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from ..core.convert import bake
from ..errors import ArgumentError, SparseFallbackWarning
from ..utils.example_input import run
from .autotune import Autotuner, Chooser, by_rule
from .convolution import Convolution, can_run_sparse
from .graph import UntraceableError, trace
from .network import SparseNetwork, check_input


def prepare(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    deterministic: bool = False,
    response_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Make a network for inference on a CPU that computes the same outputs, skipping zeros where that is faster.

    2D convolutions run sparse, in either space, fused with what follows them (BatchNorm, addition of a residual, ReLU);
    activations between them stay in one memory layout. Autotuning times each layer dense and in several sparse ways.
    3x3 convolutions that are still too dense for the sparse kernels may run dense by Winograd's minimal filtering
    (Lavin and Gray 2016, arXiv 1509.09308), where a NaN or infinity spreads over its tile of 4x4 pixels. Everything
    else is left to torch. A model whose forward `torch.fx` cannot trace is run layer by layer, with a warning.

    Args:
        model: pruned, in either space, float32 on the CPU; not changed, and not needed afterwards.
        example_input: a tensor, or a tuple of arguments. Other shapes are prepared for when they first occur.
        deterministic: choose by a rule instead of by timing: slower, but outputs are bit-equal in every process.
        response_dtype: dtype in which basis-filter responses are stored while a layer runs: float32, or bfloat16, which
            halves their cache footprint and rounds them to 8 bits; sums and everything else stay float32.

    Returns:
        A module that takes what the model takes, without gradients.

    Raises:
        BatchError: the model does not run on the example input.
        ArgumentError: `response_dtype` is another type.
        SparseExecutionError: model or input are not float32 on the CPU.

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
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    for value in (*inputs, *(parameter.detach() for parameter in model.parameters() if parameter.is_floating_point())):
        check_input(value)
    run(model, inputs)
    choose: Chooser = Autotuner(response_dtype)
    if deterministic:
        choose = partial(by_rule, response_dtype=response_dtype)
    try:
        traced = trace(model, inputs)
    except UntraceableError as error:
        warnings.warn(
            "The network is run sparse layer by layer, which is slower: torch.fx cannot trace its forward. "
            f"Found: {error}. What to do: keep Python that depends on values out of the forward, or accept the speed",
            SparseFallbackWarning,
            stacklevel=2,
        )
        return _layer_by_layer(model, inputs, choose)
    prepared = SparseNetwork(traced, choose).eval()
    prepared(*inputs)
    return prepared


def _layer_by_layer(model: nn.Module, inputs: tuple[Tensor, ...], choose: Chooser) -> nn.Module:
    """Make each convolution that is only called with one positional argument a sparse network of its own."""
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    names = {name: module for name, module in plain.named_modules(remove_duplicate=False) if can_run_sparse(module)}
    read: dict[nn.Module, Tensor | None] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        read[module] = None if named or read.get(module, module) is None else arguments[0]

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in set(names.values())]
    run(plain, inputs)
    for hook in hooks:
        hook.remove()
    sparse: dict[nn.Module, SparseNetwork] = {}
    for module, images in read.items():
        if images is None:
            continue
        traced = trace(nn.Sequential(module), (images,))
        for layer in traced.modules():
            if isinstance(layer, Convolution):
                layer.name = ""  # the network is the layer
        sparse[module] = SparseNetwork(traced, choose).eval()
        sparse[module](images)
    bake(plain)
    for name, module in names.items():
        if module in sparse:
            plain.set_submodule(name, sparse[module])
    return plain
