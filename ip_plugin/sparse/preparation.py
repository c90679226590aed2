"""`prepare`: a sparse network of a model."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from ..core.convert import bake
from ..errors import InvalidResponsesError, SparseFallbackWarning
from ..utils.example_input import run
from .autotune import Chooser
from .graph import UntraceableError, takes, trace
from .network import SparseNetwork, check_input


def prepare(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    deterministic: bool = False,
    response_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A network for inference on a CPU that computes what the model does, by non-zeros where that is faster.

    2D convolutions are run sparse, in either space, with what follows them (BatchNorm, addition of a residual, ReLU) in
    the same pass, and what is between them stays in one layout of memory; each is timed dense and in several sparse
    ways. 3x3 convolutions of which much is left may be run dense by Winograd's minimal filtering (Lavin and Gray 2016,
    arXiv 1509.09308), where a value that is not finite spoils its tile of 4x4 pixels. Everything else is left to torch.
    A model whose forward `torch.fx` cannot follow is run layer by layer, with a warning.

    Args:
        model: pruned, in either space, float32 on the CPU; not changed, and not needed afterwards.
        example_input: what it is run on, a tensor or a tuple of arguments. Other shapes are prepared for as they come.
        deterministic: choose by a rule instead of by timing: slower, but equal to the bit in every process.
        response_dtype: dtype in which basis-filter responses are stored while a layer runs: float32, or bfloat16, which
            halves their cache footprint; they are rounded to 8 bits then, sums and all else are of float32.

    Returns:
        A module that takes what the model takes, without gradients.

    Raises:
        ExampleInputError: the model does not run on it.
        InvalidResponsesError: `response_dtype` is another type.
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
        raise InvalidResponsesError(f"response_dtype={response_dtype}")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    for each in (*inputs, *(each for each in model.parameters() if each.is_floating_point())):
        check_input(each.detach() if isinstance(each, nn.Parameter) else each)
    run(model, inputs)
    choose = Chooser(by_rule=deterministic, narrow=response_dtype == torch.bfloat16)
    try:
        network = trace(model, inputs)
    except UntraceableError as error:
        warnings.warn(
            "The network is run sparse layer by layer, which is slower: torch.fx cannot trace its forward. "
            f"Found: {error}. What to do: keep Python that depends on values out of the forward, or accept the speed",
            SparseFallbackWarning,
            stacklevel=2,
        )
        return _layer_by_layer(model, inputs, choose)
    prepared = SparseNetwork(network, choose).eval()
    prepared(*inputs)
    return prepared


def _layer_by_layer(model: nn.Module, inputs: tuple[Tensor, ...], choose: Chooser) -> nn.Module:
    """Each convolution that is called with one argument is a sparse network of its own."""
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    names = {name: module for name, module in plain.named_modules(remove_duplicate=False) if takes(module)}
    seen: dict[nn.Module, Tensor] = {}
    others: set[nn.Module] = set()

    def look(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        if named:
            others.add(module)
        else:
            seen[module] = arguments[0]

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in set(names.values())]
    run(plain, inputs)
    for hook in hooks:
        hook.remove()
    made: dict[nn.Module, SparseNetwork] = {}
    for module in seen.keys() - others:
        network = trace(nn.Sequential(module), (seen[module],))
        for each in network.convolutions.values():
            each.name = ""  # it is all that there is
        made[module] = SparseNetwork(network, choose).eval()
        made[module](seen[module])
    bake(plain)
    for name, module in names.items():
        if module in made:
            plain.set_submodule(name, made[module])
    return plain
