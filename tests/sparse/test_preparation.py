"""`prepare` computes what the model computes, whatever its forward asks for, takes and returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("numba")

from torch.utils._pytree import tree_flatten, tree_map

from ip_plugin import interspace, report
from ip_plugin.errors import SparseExecutionError, SparseFallbackWarning
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import SparseNetwork, prepare

SPACES = pytest.mark.parametrize("space", ["spatial", "interspace"])
X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """Two convolutions, and what a test does with them."""

    def __init__(self, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def pruned(model: nn.Module, space: str = "interspace") -> nn.Module:
    if space == "interspace":
        interspace(model, basis="orthonormal", sharing="model")
    return apply_masks(model, select(magnitude(model), sparsity=0.8, scope="layer")).eval()


def runs(network: nn.Module) -> dict[str, str | None]:
    return {row.layer: row.runs for row in report(network).rows}


@torch.no_grad()
def agrees(network: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    torch.manual_seed(0)
    actual, structure = tree_flatten(network(*tree_map(copied, args), **tree_map(copied, kwargs)))
    torch.manual_seed(0)
    expected, expected_structure = tree_flatten(model(*tree_map(copied, args), **tree_map(copied, kwargs)))
    assert structure == expected_structure
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def asks_isinstance(m: Base, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h if isinstance(h, Tensor) else -h)


def asks_type(m: Base, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h) if type(h) is Tensor else h


@pytest.mark.contract
@SPACES
@pytest.mark.parametrize("run", [asks_isinstance, asks_type])
def test_a_forward_that_asks_for_types_takes_the_branch_of_the_model(run: Callable[..., Any], space: str) -> None:
    model = pruned(Base(run), space)
    with pytest.warns(SparseFallbackWarning, match="takes another branch"):
        network = prepare(model, X, deterministic=True)
    agrees(network, model, X)
    agrees(network, model, X[:1, :, :7])
    assert runs(network) == {"a": "fused", "b": "fused", "fc": "dense"}


@SPACES
def test_only_the_part_that_cannot_be_traced_is_taken_apart(space: str) -> None:
    model = pruned(
        nn.Sequential(OrderedDict(good=Base(lambda m, x: m.b(m.a(x)).relu()[:, :3]), bad=Base(asks_type))), space
    )
    with pytest.warns(SparseFallbackWarning, match="3 parts are sparse networks, with 4 of 4 convolutions"):
        network = prepare(model, X, deterministic=True)
    agrees(network, model, X)
    assert type(network) is nn.Sequential and type(network.bad.a) is nn.Conv2d


def reads_parameters(m: Base, x: Tensor) -> Tensor:
    weight = m.a.weight
    assert isinstance(m.a, nn.Conv2d) and weight.dim() == 4
    h = m.a(x.to(weight.device, weight.dtype))
    h = h[..., :: m.a.stride[0]] * weight.shape[0] * m.fc.weight.size(0)
    return m.b(h) + m.b.bias.expand(x.shape[0], -1)[:, :, None, None]


def uses_parameters(m: Base, x: Tensor) -> Tensor:
    return F.conv2d(m.a(x), m.b.weight, m.b.bias, padding=1) + m.b(m.a(x)) + F.linear(m.fc.weight, m.fc.weight).sum()


@SPACES
@pytest.mark.parametrize("run", [reads_parameters, uses_parameters])
@pytest.mark.parametrize("traceable", [True, False])
def test_a_forward_may_read_what_layers_hold(run: Callable[..., Any], traceable: bool, space: str) -> None:
    def undecided(m: Base, x: Tensor) -> Tensor:
        return run(m, x) if x.sum() > -1e9 else x

    model = pruned(Base(run if traceable else undecided), space)
    if traceable:
        network = prepare(model, X, deterministic=True)
        assert isinstance(network, SparseNetwork)
    else:
        with pytest.warns(SparseFallbackWarning, match="control flow"):
            network = prepare(model, X, deterministic=True)
    agrees(network, model, X)


class Viewing(nn.Module):
    """Cannot be traced, has parameters, and views its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return x.view(len(x), -1) * self.scale


@pytest.mark.parametrize("images", [X, X[:1]])
@pytest.mark.parametrize(
    "view",
    [
        lambda m, h: h.view(h.shape[0], -1),
        lambda m, h: h.view(h.shape[0], h.shape[1], -1).transpose(1, 2),
        lambda m, h: h.view_as(h.flatten(1).unflatten(1, (8, 10, 10))),
        lambda m, h: h.chunk(2, 1)[1].view(h.shape[0], -1),
        lambda m, h: m.viewing(h),
    ],
    ids=["flat", "tokens", "as", "chunks", "module"],
)  # fmt: skip
def test_the_output_of_a_convolution_can_be_viewed(view: Callable[..., Any], images: Tensor) -> None:
    model = Base(lambda m, x: view(m, m.a(x)))
    model.viewing = Viewing()
    model = pruned(model)
    network = prepare(model, images, deterministic=True)
    assert isinstance(network, SparseNetwork) and network.runs(images)[0].how == "fused"
    agrees(network, model, images)


def test_what_a_part_returns_can_be_viewed() -> None:
    model = pruned(Base(lambda m, x: m.a(x).view(2, -1) if bool(x.sum() > -1e9) else x), "spatial")
    with pytest.warns(SparseFallbackWarning):
        network = prepare(model, X, deterministic=True)
    agrees(network, model, X)


def with_options(
    m: Base, x: Tensor, scale: Tensor | None = None, *, bias: Tensor | None = None, twice: bool = False
) -> Tensor:
    h = m.a(x)
    if scale is not None:
        h = h * scale
    if twice:
        h = h + h
    return m.b(h) if bias is None else m.b(h) + bias


class Options(Base):
    def forward(self, x: Tensor, scale: Tensor | None = None, **options: Any) -> Tensor:
        return with_options(self, x, scale, **options)


@SPACES
@pytest.mark.parametrize(
    "example",
    [
        X, (X,), (X, torch.tensor(3)), (X, None), {"x": X}, {"x": X, "scale": torch.tensor(2.0)},
        {"twice": True, "x": X}, {"x": X, "bias": torch.ones(10)},
    ],
)  # fmt: skip
def test_optional_and_keyword_arguments(example: Any, space: str) -> None:
    model = pruned(Options(), space)
    network = prepare(model, example, deterministic=True)
    assert isinstance(network, SparseNetwork)
    if isinstance(example, dict):
        agrees(network, model, **example)
    else:
        agrees(network, model, *(example if isinstance(example, tuple) else (example,)))
    assert report(network, example).prunable.macs_dense == report(model, example).prunable.macs_dense


def test_the_same_arguments_may_be_given_by_name_and_others_are_refused() -> None:
    model = pruned(Options())
    network = prepare(model, (X, torch.tensor(3)), deterministic=True)
    agrees(network, model, X[:1], scale=torch.tensor(4))
    agrees(network, model, scale=torch.tensor(4), x=X)
    with pytest.raises(SparseExecutionError, match=r"Found: Tensor; prepared for Tensor, Tensor"):
        network(X)
    with pytest.raises(SparseExecutionError, match=r"Found: Tensor, Tensor, twice=True"):
        network(X, torch.tensor(3), twice=True)


def test_arguments_that_are_fixed_may_not_change() -> None:
    model = pruned(Base(lambda m, x, n: m.a(x)[:, :n]))
    network = prepare(model, (X, 3), deterministic=True)
    agrees(network, model, X, 3)
    for other in (4, 3.0):
        with pytest.raises(SparseExecutionError, match=f"Found: Tensor, {other}; prepared for Tensor, 3"):
            network(X, other)


def detect(m: Base, images: list[Tensor]) -> list[dict[str, Tensor]]:
    batch = torch.stack(list(images))
    return [{"scores": h.mean((1, 2)), "count": (h > 0).sum()} for h in m.b(m.a(batch))]


def test_lists_of_images_and_parts_that_are_called_in_another_way() -> None:
    model = pruned(Base(detect))
    images = [X[0], X[1], X[0]]
    with pytest.warns(SparseFallbackWarning):
        network = prepare(model, images, deterministic=True)
    agrees(network, model, images)
    agrees(network, model, images[:1])
    assert runs(network)["a"] == "fused"
    unbatched = pruned(Base(lambda m, x: m.a(x) if x.dim() == 4 and bool(x.sum() > -1e9) else m.a(input=x)))
    with pytest.warns(SparseFallbackWarning):
        network = prepare(unbatched, X, deterministic=True)
    agrees(network, unbatched, X[0])


class Pair(NamedTuple):
    first: Tensor
    second: list[Any]


@pytest.mark.parametrize(
    "outputs",
    [
        lambda h: OrderedDict(out=h, aux=h.mean()),
        lambda h: Pair(h, [h.relu(), None, 3]),
        lambda h: (h, {"shape": h + 1}),
        lambda h: h.argmax(1),
    ],
)
def test_outputs_have_the_structure_of_the_models(outputs: Callable[..., Any]) -> None:
    model = pruned(Base(lambda m, x: outputs(m.a(x))))
    network = prepare(model, X, deterministic=True)
    assert isinstance(network, SparseNetwork)
    agrees(network, model, X)


def test_random_numbers_are_drawn_at_every_call() -> None:
    model = pruned(Base(lambda m, x: m.b(m.a(x) + torch.randn(10))))
    with pytest.warns(SparseFallbackWarning, match="draws random numbers"):
        network = prepare(model, X, deterministic=True)
    agrees(network, model, X)
    assert not torch.equal(network(X), network(X))


def test_a_new_shape_leaves_the_input_and_the_random_state_as_the_model_does() -> None:
    model = pruned(Base(lambda m, x: m.b(m.a(x.add_(1)) + torch.rand_like(x).mean())))
    network = prepare(model, X, deterministic=True)
    assert isinstance(network, SparseNetwork)
    images = torch.zeros(1, 3, 7, 7)
    torch.manual_seed(0)
    first = network(images)
    assert torch.equal(images, torch.ones_like(images))
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(torch.zeros(1, 3, 7, 7)).detach(), rtol=1e-4, atol=1e-5)


def test_shapes_that_depend_on_values() -> None:
    def selects(m: Base, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h[h.mean((1, 2, 3)) > h.mean()])

    model = pruned(Base(selects))
    with pytest.warns(SparseFallbackWarning, match="depend on values"):
        network = prepare(model, X, deterministic=True)
    agrees(network, model, X)
    agrees(network, model, torch.randn(5, 3, 10, 10))


def test_shapes_that_change_after_preparing_are_refused() -> None:
    model = pruned(Base(lambda m, x: m.b(m.a(x)[x.mean((1, 2, 3)) > 0])))
    network = prepare(model, X.abs(), deterministic=True)
    with pytest.raises(SparseExecutionError, match=r"shape \(1, 8, 10, 10\) instead of \(2, 8, 10, 10\)"):
        network(torch.cat([X[:1].abs(), -X[1:].abs()]))


@pytest.mark.parametrize("which", ["norm", "relu"])
def test_layers_behind_a_convolution_keep_their_hooks(which: str) -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), relu=nn.ReLU()))
    model.get_submodule(which).register_forward_hook(lambda module, given, made: made * 2)
    model = pruned(model)
    agrees(prepare(model, X, deterministic=True), model, X)


def test_layers_that_are_subclasses_run_sparse() -> None:
    class Named(nn.Conv2d):
        pass

    model = pruned(nn.Sequential(Named(3, 8, 3), nn.ReLU()))
    network = prepare(model, X, deterministic=True)
    assert runs(network) == {"0": "fused"}
    agrees(network, model, X)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = pruned(Base(lambda m, x: m.a(x)))
    model.kept = model.a(X)
    with pytest.raises(SparseExecutionError, match=r"copy.deepcopy\(model\) raises RuntimeError"):
        prepare(model, X)


def test_a_model_that_baking_would_change_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, words: Tensor) -> Any:
            return self.head(self.table(words))

    model = pruned(Tied(), "spatial")
    with pytest.raises(SparseExecutionError, match="must compute the same when it is baked"):
        prepare(model, torch.tensor([[3, 4]]))


@pytest.mark.parametrize("kind", ["opaque", "unknown"])
def test_objects_of_other_libraries_in_arguments_and_outputs(kind: str) -> None:
    class Cache:
        pass

    if kind == "opaque":
        model, example = pruned(Base(lambda m, x, cache: m.b(m.a(x)))), (X, Cache())
        with pytest.warns(SparseFallbackWarning, match="an argument is a Cache"):
            network = prepare(model, example, deterministic=True)
        agrees(network, model, *example)
        assert runs(network)["b"] == "fused"
    else:
        model = pruned(Base(lambda m, x: (m.b(m.a(x)), Cache())))
        with pytest.warns(SparseFallbackWarning, match="type: .*Cache"):
            network = prepare(model, X, deterministic=True)
        assert isinstance(network(X)[1], Cache)


@pytest.mark.filterwarnings("ignore::ip_plugin.errors.SparseFallbackWarning")
@pytest.mark.parametrize(
    ("library", "name", "shape"),
    [
        ("timm", "test_efficientnet", (1, 3, 32, 32)), ("timm", "test_vit", (1, 3, 160, 160)),
        ("torchvision", "shufflenet_v2_x0_5", (1, 3, 32, 32)),
    ],
)  # fmt: skip
def test_networks_of_libraries(library: str, name: str, shape: tuple[int, ...]) -> None:
    make = {"timm": "create_model", "torchvision": "get_model"}[library]
    module = pytest.importorskip({"timm": "timm", "torchvision": "torchvision.models"}[library])
    model, images = pruned(getattr(module, make)(name)), torch.randn(shape)
    network = prepare(model, images, deterministic=True)
    agrees(network, model, images)
    actual, expected = report(network, images), report(model, images)
    for one, other in zip((*actual.rows, actual.everything), (*expected.rows, expected.everything), strict=True):
        assert (one.layer, one.parameters, one.nonzeros, one.macs_dense, one.macs_basis) == (
            other.layer, other.parameters, other.nonzeros, other.macs_dense, other.macs_basis,
        )  # fmt: skip
