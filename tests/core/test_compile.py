"""torch.compile with inductor; a change of masks needs no new graph."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from kinds import Case, backward, train
from torch import nn

from ip_plugin import interspace, masks, set_masks

pytestmark = pytest.mark.contract


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_computes_what_eager_computes() -> None:
    model, x = Case("conv2d", "orthonormal", "model").interspace()
    set_masks(model, {"0": torch.rand(4, 3, 3, 3) < 0.5})
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(backward(compiled, x), backward(eager, x))
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    train(compiled, x)
    train(eager, x)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)


def test_a_changed_mask_is_seen_without_a_new_graph() -> None:
    model, x = Case("conv2d", "standard", "layer").interspace()
    set_masks(model, {"0": torch.rand(4, 3, 3, 3) < 0.5})
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    torch.testing.assert_close(compiled(x), model(x))
    for _ in range(3):
        set_masks(model, {"0": ~masks(model)["0"]})
        torch.testing.assert_close(compiled(x), model(x))
    assert graphs == 1


def test_a_plain_model_compiled_before_runs_after_conversion() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    interspace(model)
    assert torch.equal(compiled(x), expected)
    set_masks(model, {"0": torch.zeros(4, 3, 3, 3)})
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("kind", ["set", "rigl", "gradual"])
def test_a_mask_change_needs_no_recompilation(kind: str) -> None:
    from ip_plugin.methods import SET, Gradual, RigL

    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model, x = Case("conv2d", "orthonormal", "model").interspace()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = {
        "set": lambda: SET(model, optimizer, sparsity=0.5, end_step=100, update_every=1),
        "rigl": lambda: RigL(model, optimizer, sparsity=0.5, end_step=100, update_every=1),
        "gradual": lambda: Gradual(model, sparsity=0.6, end_step=50, initial=0.3),
    }[kind]()
    everything = {"0": torch.Size([4, 3, 3, 3]), "2": torch.Size([5, 4, 3, 3]), "4": model[4].weight.shape}
    if kind == "gradual":
        set_masks(model, {name: torch.ones(shape) for name, shape in everything.items()})
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    counts, outputs = [], []
    for _ in range(4):
        outputs.append(compiled(x).detach())
        counts.append(len(graphs))
        schedule.step(*([lambda: model(x).square().sum()] if kind == "rigl" else []))
    assert counts == [1, 1, 1, 1]
    assert all(not torch.equal(outputs[0], later) for later in outputs[1:])
    torch.testing.assert_close(compiled(x), model(x))
