"""Masks of `torch.nn.utils.prune` (the host): find them, read them, remove them.

The host stores a pruned tensor ``name`` of a module as a Parameter ``name_orig``, a buffer ``name_mask``, a plain
attribute ``name`` (their product) and a forward pre-hook that recomputes it. Its `remove` makes the zeros permanent;
`take_off` does not.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .parametrization import restore_order


def pruned_names(module: nn.Module) -> list[str]:
    """Names of the tensors of `module` (not of its children) that the host has pruned.

    Found by the tensors, not by the hook: the host removes its hook before it computes a mask, so the hook is lost if
    that fails.
    """
    names = (name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig"))
    return [name for name in names if f"{name}_mask" in module._buffers]


def mask(module: nn.Module, tensor_name: str) -> Tensor | None:
    """A copy of the host's mask as bools; None if the host has not pruned the tensor."""
    if tensor_name not in pruned_names(module):
        return None
    mask: Tensor = getattr(module, tensor_name + "_mask")
    return mask.detach() != 0


def parameter(module: nn.Module, tensor_name: str) -> nn.Parameter:
    """The Parameter behind a tensor, whether the host has pruned it or not."""
    pruned = tensor_name in pruned_names(module)
    parameter: nn.Parameter = getattr(module, tensor_name + "_orig" if pruned else tensor_name)
    return parameter


def take_off(module: nn.Module, tensor_name: str) -> Tensor | None:
    """Remove the host's hook, mask and attribute, and restore the name of the Parameter; its values stay unmasked.

    Returns:
        The mask that was removed, as bools; None if there was none.
    """
    taken = mask(module, tensor_name)
    if taken is None:
        return None
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == tensor_name:
            del module._forward_pre_hooks[key]
    original = module._parameters.pop(tensor_name + "_orig")
    del module._buffers[tensor_name + "_mask"]
    module.__dict__.pop(tensor_name, None)
    module.register_parameter(tensor_name, original)
    # Torch's layers register the weight before the bias.
    restore_order(module, ("weight", "bias"))
    return taken
