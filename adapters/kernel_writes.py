"""Writes into kernels reach the coefficients: what is done in place to ``layer.weight``, which is a computed tensor.

Hosts' documentation prunes softly by ``layer.weight.data[indices] *= 0``. On a layer in the interspace that writes into
a temporary tensor. While a `KernelWrites` watches a layer, the kernels that it has handed out are compared with what
they were, and what was written is solved for coefficients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from ip_plugin.reparametrization import Interspace, held_in


class KernelWrites:
    """Watches the weights of some layers until `close`.

    What was written is taken over before the weight is computed again, and when the watch ends. Kernels that were not
    written keep their coefficients bit for bit; kernels of zeros have coefficients of zeros.

    Args:
        modules: those that are in the interspace or masked by this package are watched.

    >>> from ip_plugin import interspace
    >>> layer = interspace(nn.Conv2d(3, 8, 3), basis="dct")
    >>> writes = KernelWrites([layer])
    >>> layer.weight.data[[1, 5]] *= 0
    >>> writes.close()
    >>> layer.parametrizations.weight.original.flatten(1).any(dim=1).tolist()
    [True, False, True, True, True, False, True, True]
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._watched = {each.chain for each in held_in(("", module) for module in set(modules))}
        self._handed_out: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._hooks: list[RemovableHandle] = []
        for chain in self._watched:
            self._hooks.append(chain.register_forward_pre_hook(lambda chain, _: self._take_over(chain)))
            self._hooks.append(chain.register_forward_hook(lambda chain, _, weight: self._hand_out(chain, weight)))

    def take_over(self) -> None:
        """Take over what was written so far."""
        for chain in list(self._handed_out):
            self._take_over(chain)

    def close(self) -> None:
        """Take over what was written, and watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self.take_over()
        self._watched.clear()

    def _hand_out(self, chain: nn.Module, weight: Tensor) -> None:
        if chain in self._watched:  # a copy of the model has copies of the hooks
            self._handed_out[chain] = weight.detach(), weight.detach().clone()

    @torch.no_grad()
    def _take_over(self, chain: nn.Module) -> None:
        if chain not in self._handed_out:
            return
        now, before = self._handed_out.pop(chain)
        if torch.equal(now, before):
            return
        assert isinstance(chain, ParametrizationList)
        original, parametrization = chain.original, chain[0]
        assert isinstance(original, Tensor)
        written = now != before
        if isinstance(parametrization, Interspace):
            written = written.flatten(2).any(2).reshape(*now.shape[:2], *[1] * (now.dim() - 2))
            if bool((now * written).any()):
                now = parametrization.right_inverse(now)
        original.copy_(torch.where(written, now, original))
