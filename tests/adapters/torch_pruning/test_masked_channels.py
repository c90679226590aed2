"""Masked channels are cut out, and the smaller network computes what the masked one computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip_plugin import bake, interspace, masks, prunable, report, set_masks
from ip_plugin.adapters import torch_prune as prune
from ip_plugin.errors import BatchError, HostError

pytest.importorskip("torch_pruning")

from ip_plugin.adapters.torch_pruning.masked_channels import cut_masked_channels

pytestmark = pytest.mark.contract


class Net(nn.Module):
    """A residual sum, a concatenation, a depthwise and a grouped convolution, a flattened linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.left = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.branch = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.left(x))
        x = F.relu(self.depthwise(torch.cat([x, F.relu(self.branch(x))], 1)))
        return self.head(F.max_pool2d(F.relu(self.norm(self.grouped(x))), 2).flatten(1))


def network(space: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x)  # the norm has statistics
    return interspace(model, basis="dct", sharing="model") if space == "interspace" else model, x


def masked(shape: tuple[int, ...], dim: int, channels: list[int]) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    mask.index_fill_(dim, torch.tensor(channels), False)
    return mask


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("training", [True, False])
def test_what_nothing_makes_is_cut(space: str, training: bool) -> None:
    model, x = network(space)
    bases = {name for name, _ in model.named_parameters() if name.endswith("basis")}
    # Both summands of the residual lose 1, 3, 5 and one of them 6; the branch loses its last channel.
    set_masks(model, {"stem": masked((8, 3, 3, 3), 0, [1, 3, 5, 6]), "left": masked((8, 8, 3, 3), 0, [1, 3, 5]),
                      "branch": masked((4, 8, 3, 3), 0, [3]), "head": torch.rand(3, 128) > 0.2})  # fmt: skip
    expected = model.eval()(x)
    model.train(training)
    before = report(copy.deepcopy(model), x).prunable.macs_dense
    with pytest.warns(UserWarning, match=r"^2 masked channels of 'depthwise' stay: .*\('grouped'\)$") as caught:
        cut_masked_channels(model, x)
    assert caught[0].filename == __file__
    assert model.training is training
    # The grouped convolution reads 0 to 5 and 6 to 11 of the concatenation, and must lose equally many of both: 1, 3, 5
    # and 11 (the last of the branch) are empty.
    assert (model.stem.out_channels, model.left.out_channels, model.branch.out_channels) == (7, 7, 3)
    assert (model.left.in_channels, model.depthwise.groups, model.grouped.in_channels) == (7, 10, 10)
    torch.testing.assert_close(model.eval()(x), expected)
    assert report(model, x).prunable.macs_dense < before
    assert {name for name, _ in model.named_parameters() if name.endswith("basis")} == bases
    assert set(masks(model)) >= {"head"}
    torch.testing.assert_close(bake(copy.deepcopy(model))(x), expected)


@pytest.mark.parametrize("space", ["spatial", "interspace"])
def test_what_nothing_uses_is_cut(space: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 4, 3), nn.Flatten(),
                          nn.Linear(4 * 16, 2)).double()  # fmt: skip
    if space == "interspace":
        interspace(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    set_masks(model, {"3": masked((4, 6, 3, 3), 1, [0, 4]), "5": masked((2, 64), 1, list(range(16, 32)))})
    expected = model.eval()(x)
    cut_masked_channels(model, x)
    shapes = [tuple(m.weight.shape) for m in (model[0], model[1], model[3], model[5])]
    assert shapes == [(4, 3, 3, 3), (4,), (3, 4, 3, 3), (2, 48)]
    torch.testing.assert_close(model(x), expected)
    assert masks(model) == {}
    assert (type(model[5]) is nn.Linear) == (space == "spatial")


@pytest.mark.parametrize("how", ["bias", "norm"])
def test_a_channel_that_still_says_something_stays(how: str) -> None:
    torch.manual_seed(0)
    between = nn.BatchNorm2d(6) if how == "norm" else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=how == "bias"), between, nn.ReLU(), nn.Conv2d(6, 4, 3))
    if how == "norm":
        nn.init.constant_(between.bias, 0.5)
    interspace(model)
    set_masks(model, {"0": masked((6, 3, 3, 3), 0, [2, 3])})
    x = torch.randn(1, 3, 8, 8)
    cut_masked_channels(model, x)
    assert model[0].out_channels == 6
    prune.custom_from_mask(model[0 if how == "bias" else 1], "bias", torch.tensor([1, 1, 0, 1, 1, 1.0]))
    if how == "norm":
        prune.custom_from_mask(model[1], "weight", torch.tensor([1, 1, 0, 1, 1, 1.0]))
    expected = model.eval()(x)
    cut_masked_channels(model, x)
    assert model[0].out_channels == model[3].in_channels == 5
    torch.testing.assert_close(model(x), expected)


def test_one_channel_stays_and_outputs_are_not_cut() -> None:
    model = interspace(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    set_masks(model, {"0": torch.zeros(6, 3, 3, 3, dtype=torch.bool), "2": masked((4, 6, 3, 3), 0, [0, 1])})
    cut_masked_channels(model, torch.randn(1, 3, 8, 8))
    assert (model[0].out_channels, model[2].out_channels) == (1, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3)),
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Flatten(), nn.LayerNorm(216), nn.Linear(216, 2)),
    ],
)
def test_norms_that_mix_channels_keep_theirs(make: Callable[[], nn.Sequential]) -> None:
    model = set_masks(interspace(make()), {"0": masked((6, 3, 3, 3), 0, [0, 1, 2])})
    cut_masked_channels(model, torch.randn(1, 3, 8, 8))
    assert model[0].out_channels == 6


def test_an_output_that_would_change_is_refused_and_nothing_changes() -> None:
    model = interspace(
        nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Sigmoid(), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 1))
    )
    set_masks(model, {"0": masked((6, 3, 3, 3), 0, [0, 1]), "3": torch.ones(4, 4, 1, 1)})
    x = torch.randn(1, 3, 8, 8)
    before, parameters = model(x), list(model.parameters())
    with pytest.raises(HostError, match="would change by 0"):
        cut_masked_channels(model, x)
    assert torch.equal(model(x), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert masks(model)["3"].all()
    with pytest.raises(BatchError, match="must run on `example_input`"):
        cut_masked_channels(model, torch.randn(1, 5, 8, 8))


def test_a_model_that_outputs_nan_is_refused_for_that() -> None:
    model = interspace(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    set_masks(model, {"0": masked((6, 3, 3, 3), 0, [0, 1])})
    x = torch.randn(1, 3, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(BatchError, match="Found: 4 NaN values in the outputs before anything was removed"):
        cut_masked_channels(model, x)
    assert model[0].out_channels == 6
    model[2].bias.data[1] = torch.inf  # as logits that are masked
    cut_masked_channels(model, torch.randn(1, 3, 8, 8))
    assert model[0].out_channels == 4


def test_the_optimizer_goes_on() -> None:
    model = interspace(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    prune.ln_structured(model[0], "weight", amount=2, n=2, dim=0)
    cut_masked_channels(model, torch.randn(1, 3, 8, 8), optimizer=optimizer)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())


def test_a_depthwise_bias_keeps_a_channel_that_nothing_comes_into() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 0.0, 3.0, 0.0]))
    x = torch.randn(1, 3, 8, 8)
    set_masks(model, {"0": masked((4, 3, 3, 3), 0, [1, 2])})
    expected = model(x)
    cut_masked_channels(model, x)
    assert model[0].out_channels == model[1].out_channels == model[2].in_channels == 3
    torch.testing.assert_close(model(x), expected)


class Joined(nn.Module):
    """A grouped convolution of four groups reads six channels of one convolution and two of another."""

    def __init__(self) -> None:
        super().__init__()
        self.six, self.two = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(torch.cat([self.six(x), self.two(x)], 1))


def test_channels_that_do_not_fall_into_the_groups_stay() -> None:
    torch.manual_seed(0)
    model, x = Joined(), torch.randn(1, 3, 4, 4)
    set_masks(model, {"six": masked((6, 3, 1, 1), 0, [0, 1, 2]), "two": masked((2, 3, 1, 1), 0, [1])})
    expected = model(x)
    with pytest.warns(UserWarning, match="masked channels of '(six|two)' stay: .*'grouped'"):
        cut_masked_channels(model, x)
    assert (model.six.out_channels, model.two.out_channels) == (6, 2)
    torch.testing.assert_close(model(x), expected)


def grouped(cls: type[nn.Module] = nn.Conv2d, out: int = 16) -> nn.Sequential:
    """A grouped convolution of four groups, four inputs each, between two others."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        cls(16, out, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, 4, 3),
    ).double()  # fmt: skip


#: Channels of each group of four that stay.
EQUALLY_MANY = [[0], [1], [3], [2]]


@pytest.mark.parametrize("space", ["spatial", "interspace"])
@pytest.mark.parametrize("with_optimizer", [False, True])
@pytest.mark.parametrize("where", ["inputs", "outputs", "both"])
def test_groups_that_lose_different_channels_but_equally_many(where: str, with_optimizer: bool, space: str) -> None:
    model = grouped()
    if space == "interspace":
        interspace(model, basis="dct", sharing="model")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    gone = [4 * group + i for group, kept in enumerate(EQUALLY_MANY) for i in range(4) if i not in kept]
    kept = [4 * group + i for group, (i,) in enumerate(EQUALLY_MANY)]
    keep = {"3": torch.rand(16, 4, 3, 3) < 0.7}
    if where != "outputs":
        keep["0"] = masked((16, 3, 3, 3), 0, gone)
        nn.init.constant_(model[1].running_mean, 0)
        model[1].bias.data[gone] = 0
        model[1].weight.data[gone] = 0
    if where != "inputs":
        keep["3"] &= masked((16, 4, 3, 3), 0, gone)
        model[4].bias.data[gone] = model[4].weight.data[gone] = 0
    set_masks(model, keep)
    expected, masks_before = model.eval()(x), masks(model)
    mine = optimizer.state[prunable(model)[1][0].original if space == "interspace" else getattr(*prunable(model)[1])]
    momentum = mine["momentum_buffer"].clone()
    cut_masked_channels(model, x, optimizer=optimizer if with_optimizer else None)
    channels = (model[0].out_channels, model[3].in_channels, model[3].out_channels, model[6].in_channels)
    assert channels == {"inputs": (4, 4, 16, 16), "outputs": (16, 16, 4, 4), "both": (4, 4, 4, 4)}[where]
    torch.testing.assert_close(model(x), expected)
    rows = kept if where != "inputs" else list(range(16))
    columns = [EQUALLY_MANY[row // 4] if where != "outputs" else [0, 1, 2, 3] for row in rows]
    expected_mask = torch.stack([masks_before["3"][row, some] for row, some in zip(rows, columns, strict=True)])
    assert torch.equal(masks(model)["3"], expected_mask)
    if with_optimizer:
        found = optimizer.state[getattr(*prunable(model)[1])]["momentum_buffer"]
        assert torch.equal(found, torch.stack([momentum[row, some] for row, some in zip(rows, columns, strict=True)]))


def test_groups_that_lose_unequally_many_keep_some_with_a_warning() -> None:
    model = grouped()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gone = [0, 1, 2, 5, 6, 8, 11, 14, 15, 12]  # three, two, two, three
    nn.init.constant_(model[1].weight, 1)
    set_masks(model, {"0": masked((16, 3, 3, 3), 0, gone)})
    expected = model.eval()(x)
    with pytest.warns(UserWarning, match=r"^2 masked channels of '0' stay: .* \('3'\)$"):
        cut_masked_channels(model, x)
    assert (model[0].out_channels, model[3].in_channels) == (8, 8)
    torch.testing.assert_close(model(x), expected)


def test_of_grouped_convolutions_without_anything_left_one_channel_of_each_group_stays() -> None:
    model = grouped()
    set_masks(model, {"0": torch.zeros(16, 3, 3, 3)})
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model.eval()(x)
    with pytest.warns(UserWarning, match="^4 masked channels of '0' stay"):
        cut_masked_channels(model, x)
    assert (model[0].out_channels, model[3].in_channels) == (4, 4)
    torch.testing.assert_close(model(x), expected)


def test_grouped_transposed_convolutions_are_left_alone_with_a_warning() -> None:
    model = grouped(nn.ConvTranspose2d)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    set_masks(model, {"0": masked((16, 3, 3, 3), 0, [0, 4, 8, 12])})
    expected = model.eval()(x)
    with pytest.warns(UserWarning, match="^4 masked channels of '0' stay: .* no transposed ones"):
        cut_masked_channels(model, x)
    assert model[0].out_channels == 16
    assert torch.equal(model(x), expected)
