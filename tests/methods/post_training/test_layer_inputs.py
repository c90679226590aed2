"""What layers see: patches, their moments, and which BatchNorm is behind a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import KINDS
from torch import Tensor, nn

from ip_plugin import interspace
from ip_plugin.core.tensor_ref import TensorRef, prunable_tensors
from ip_plugin.methods.post_training import layer_inputs as inputs
from ip_plugin.methods.post_training.layer_inputs import Moments, multiplies, observe, patches, rows

F64 = torch.float64


def output(module: Any, x: Tensor) -> Tensor:
    """By `patches` and `rows`, with the bias, in the module's own shape."""
    y = module(x)
    size = y.shape[2:] if x.dim() > 2 and not isinstance(module, nn.Linear) else ()
    found = torch.einsum("gsin,goin->sgo", patches(module, x, size), rows(module, module.weight)).flatten(1)
    if module.bias is not None:
        found = found + module.bias
    return found.reshape(len(y), *size, -1).movedim(-1, 1) if size else found.reshape(y.shape)


@pytest.mark.parametrize("convert", [False, True], ids=["spatial", "interspace"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "subclass"])
def test_weights_times_patches_are_the_outputs(kind: str, convert: bool) -> None:
    model, x = KINDS[kind].ready(F64)
    if convert:
        interspace(model, basis="dct")
    for module in model:
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            torch.testing.assert_close(output(module, x), module(x))
        x = module(x)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=2, dtype=F64),
        nn.Conv1d(4, 3, 3, padding=2, padding_mode="replicate", dtype=F64),
        nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(3, 2), padding=(1, 0), output_padding=(2, 1), dilation=(1, 2), groups=2, dtype=F64
        ),
        nn.ConvTranspose1d(4, 2, 2, padding=3, stride=4, dtype=F64),
        nn.Conv3d(4, 2, (1, 3, 2), stride=(2, 1, 1), padding="valid", dtype=F64),
    ],
    ids=str,
)
def test_every_option_of_a_convolution(module: Any) -> None:
    x = torch.randn(2, 4, *(7, 8, 5)[: len(module.kernel_size)], dtype=F64)
    torch.testing.assert_close(output(module, x), module(x))


def test_linear_layers_take_any_number_of_dimensions() -> None:
    linear = nn.Linear(3, 2, dtype=F64)
    x = torch.randn(2, 5, 3, dtype=F64)
    torch.testing.assert_close(output(linear, x), linear(x))


def seen_by(model: nn.Module, batches: list[Any]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    parts: dict[str, list[Tensor]] = {}
    watchers = {each: parts.setdefault(each.module_name, []).append for each in prunable_tensors(model)}
    takers = observe(model, watchers, batches)
    return {name: torch.cat(some, 1) for name, some in parts.items() if some}, takers


class Net(nn.Module):
    """Layers with a BatchNorm right behind, behind something else, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv1d(2, 2, 1) for _ in range(4))
        self.behind, self.later, self.shared = (nn.BatchNorm1d(2) for _ in range(3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.behind(self.a(x))
        x = self.later(self.b(x).relu())
        return self.shared(self.d(self.shared(self.c(input=x))))


def test_the_batch_norm_right_behind_a_layer_is_found() -> None:
    model = Net()
    found, takers = seen_by(model, [torch.randn(3, 2, 4), torch.randn(2, 2, 4)])
    assert takers == {"a": ["behind"]}
    assert found.keys() == {"a", "b", "c", "d"}
    assert all(each.shape == (1, 20, 2, 1) for each in found.values())


def test_a_model_runs_in_evaluation_mode_and_without_a_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
    model[2].eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    x = torch.randn(4, 3)
    torch.set_rng_state(state)
    found, _ = seen_by(model, [(x,), {"input": x}])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)
    expected = model.eval()[:3](x).detach()
    torch.testing.assert_close(found["3"], expected.repeat(2, 1)[None, :, :, None])


def test_hooks_go_where_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError):
        seen_by(model, [torch.randn(2, 4)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_inputs_without_a_batch_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2))
    x = torch.randn(5, 2, 6, 6)
    whole, _ = seen_by(model, [x])
    single, _ = seen_by(model, list(x))
    monkeypatch.setattr(inputs, "_AT_ONCE", 2 * 2 * 9 * 16)
    sizes: list[int] = []
    observe(model, {prunable_tensors(model)[0]: lambda seen: sizes.append(seen.shape[1])}, [x])
    assert sizes == [32, 32, 16]
    for name, each in whole.items():
        torch.testing.assert_close(single[name], each)
        torch.testing.assert_close(seen_by(model, [x])[0][name], each)


def test_moments_of_parts_are_those_of_all() -> None:
    seen = torch.randn(2, 30, 3, 2, dtype=F64)
    moments = Moments()
    for some in seen.split((7, 20, 3), 1):
        moments.add(some)
    flat = seen.flatten(2)
    torch.testing.assert_close(moments.mean, flat.mean(1))
    torch.testing.assert_close(moments.second(central=False), flat.mT @ flat / 30)
    for group, each in zip(moments.second(central=True), flat, strict=True):
        torch.testing.assert_close(group, each.mT.cov(correction=0))


def test_which_layers_multiply() -> None:
    model, _ = KINDS["subclass"].ready()
    assert [multiplies(each) for each in prunable_tensors(model)] == [False, False, True]
    model, _ = KINDS["conv2d"].ready()
    interspace(model)
    assert all(multiplies(each) for each in prunable_tensors(model))
    nn.utils.parametrizations.weight_norm(model[0])
    assert not multiplies(TensorRef(model[0]))
