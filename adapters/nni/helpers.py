"""NNI's helper functions that inspect a model's layers, in either space.

NNI finds layers by class names and in traces of the model. On a model in the interspace its own functions of these
names find no convolutions, and do not say so; these expose the model as plain layers (`plain_layers`) to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from nni.compression import utils as host
from nni.compression.utils import counter as host_counter
from nni.compression.utils import shape_dependency as host_dependencies
from torch import nn

from ip_plugin.adapters.shared.plain_view import plain_layers

Result = TypeVar("Result")


@contextmanager
def _exposed(*values: object) -> Iterator[None]:
    """While the block runs, every model among some values is exposed as plain layers."""
    with ExitStack() as stack:
        for value in values:
            if isinstance(value, nn.Module):
                stack.enter_context(plain_layers(value))
        yield


def _on_plain_layers(function: Callable[..., Result]) -> Callable[..., Result]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        with _exposed(*args, *kwargs.values()):
            return function(*args, **kwargs)

    return call


auto_set_denpendency_group_ids = _on_plain_layers(host.auto_set_denpendency_group_ids)
compute_sparsity_compact2origin = _on_plain_layers(host.compute_sparsity_compact2origin)
compute_sparsity_mask2compact = _on_plain_layers(host.compute_sparsity_mask2compact)
count_flops_params = _on_plain_layers(host_counter.count_flops_params)


class _OnPlainLayers(host_dependencies.Dependency):  # type: ignore[misc]
    """A dependency class of NNI that looks at plain layers, at construction and in `build_dependency`."""

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        with _exposed(model):
            super().__init__(model, *args, **kwargs)

    def build_dependency(self) -> None:
        """Find the dependencies; see NNI's class."""
        with _exposed(self.model):
            super().build_dependency()


class ChannelDependency(_OnPlainLayers, host_dependencies.ChannelDependency):  # type: ignore[misc]
    """Layers whose output channels must be pruned alike; see NNI's class."""


class InputChannelDependency(_OnPlainLayers, host_dependencies.InputChannelDependency):  # type: ignore[misc]
    """Layers whose input channels must be pruned alike; see NNI's class."""


class GroupDependency(_OnPlainLayers, host_dependencies.GroupDependency):  # type: ignore[misc]
    """Numbers of groups in which layers must be pruned; see NNI's class."""


class ReshapeDependency(_OnPlainLayers, host_dependencies.ReshapeDependency):  # type: ignore[misc]
    """Layers behind which a reshape mixes the channels; see NNI's class."""
