"""Lightning's `ModelPruning` callback in either space.

Lightning's own callback rejects the module that holds coefficients; this subclass accepts it, in the pairs of
``ip_plugin.prunable(model)`` and as ``(conv, "weight")``, and prunes by `ip_plugin.adapters.torch_prune`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning as Host
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ip_plugin.adapters import torch_prune
from ip_plugin.core.convert import bake
from ip_plugin.core.tensor_ref import TensorRef, parametrized_tensors

Pairs = Sequence[tuple[nn.Module, str]]


class _OneLine:
    """A layer that prints as in the plain model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __repr__(self) -> str:
        if not parametrize.is_parametrized(self.module):
            return repr(self.module)
        return f"{parametrize.type_before_parametrizations(self.module).__name__}({self.module.extra_repr()})"


class ModelPruning(Host):
    """Lightning's callback, with its arguments, for models in either space.

    ``use_lottery_ticket_hypothesis`` rewinds coefficients and their basis; ``make_pruning_permanent`` removes masks
    (in the interspace the layers stay there: call ``ip_plugin.bake`` when training has ended).

    >>> from ip_plugin.adapters.lightning import ModelPruning
    >>> callback = ModelPruning("l1_unstructured", amount=0.5)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.pruning_fn, partial):  # a function of torch, which prunes each tensor by itself
            ours = getattr(torch_prune, self.pruning_fn.func.__name__)
            self.pruning_fn = partial(ours, **self.pruning_fn.keywords)

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: LightningModule, parameters_to_prune: Pairs = (), parameter_names: Sequence[str] = ()
    ) -> Pairs:
        """The pairs to prune, as (layer, tensor name), checked by Lightning."""
        if not parameters_to_prune:
            plain = Host.sanitize_parameters_to_prune(pl_module, (), parameter_names)
            names = parameter_names or Host.PARAMETER_NAMES
            pairs = set(plain) | {(ref.module, ref.tensor_name) for ref in parametrized_tensors(pl_module)}
            return [(module, name) for name in names for module in pl_module.modules() if (module, name) in pairs]
        refs = parametrized_tensors(pl_module)
        owners: dict[object, tuple[nn.Module, str]] = {ref.chain: (ref.module, ref.tensor_name) for ref in refs}
        translated = [
            owners.get(pair[0], pair) if isinstance(pair[0], nn.Module) else pair for pair in parameters_to_prune
        ]
        checked: Pairs = Host.sanitize_parameters_to_prune(pl_module, translated, parameter_names)
        return checked

    def _apply_global_pruning(self, amount: float) -> None:
        method: Any = self.pruning_fn
        torch_prune.global_unstructured(self._parameters_to_prune, method, **self._resolve_global_kwargs(amount))

    def _log_sparsity_stats(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's log lines, with layers as in the plain model: one line each."""
        pairs = self._parameters_to_prune
        one_line: Any = [(_OneLine(module), name) for module, name in pairs]
        self._parameters_to_prune = one_line
        try:
            super()._log_sparsity_stats(*args, **kwargs)
        finally:
            self._parameters_to_prune = pairs

    @torch.no_grad()
    def apply_lottery_ticket_hypothesis(self) -> None:
        """Restore the first values of parameters, or resample them: coefficients and basis."""
        assert self._original_layers is not None
        for reference in self._original_layers.values():
            first = reference["data"]
            resampled = None
            if self._resample_parameters and callable(getattr(first, "reset_parameters", None)):
                resampled = bake(deepcopy(first))
                resampled.reset_parameters()  # type: ignore[operator]
            for i, name in reference["names"]:
                module = self._parameters_to_prune[i][0]
                then, now = TensorRef(first, name), TensorRef(module, name)
                value: Tensor = then.parameter
                if resampled is not None:
                    value = getattr(resampled, name)
                    value = value if then.parametrization is None else then.parametrization.right_inverse(value)
                now.parameter.copy_(value)
                if then.interspace is not None and now.interspace is not None:
                    now.interspace.basis.copy_(then.interspace.basis)
                    now.interspace.constraint = then.interspace.constraint

    def make_pruning_permanent(self, module: nn.Module) -> None:
        """Set masked entries to zero and remove the masks, ours and those of `torch.nn.utils.prune`."""
        for ref in parametrized_tensors(module):
            if ref.parametrization is not None and ref.parametrization.mask is not None:
                torch_prune.remove(ref.module, ref.tensor_name)
        super().make_pruning_permanent(module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save a checkpoint without masks, so that it can be loaded into a model that is not pruned."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if not self._make_pruning_permanent:
            return
        state = checkpoint["state_dict"]
        for ref in parametrized_tensors(pl_module):
            prefix = f"{ref.module_name}." if ref.module_name else ""
            key = f"{prefix}parametrizations.{ref.tensor_name}"
            mask = state.pop(f"{key}.0.mask", None)
            if mask is not None:
                state[f"{key}.original"] = state[f"{key}.original"] * mask
            if ref.interspace is None:
                state[ref.name] = state.pop(f"{key}.original")
