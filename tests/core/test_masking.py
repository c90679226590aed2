"""Masks: set, read, adopted from `torch.nn.utils.prune`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from kinds import backward, train
from torch import nn
from torch.nn.utils import prune as host

from ip_plugin import adopt_masks, bake, interspace, masks, prunable, set_masks

pytestmark = pytest.mark.contract

KEEP = torch.tensor([[True, False, True], [False, True, True]])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(6, 3))


@pytest.fixture(params=["spatial", "interspace"])
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    return network() if request.param == "spatial" else interspace(network())


X = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])


def test_a_mask_by_hand(model: nn.Sequential) -> None:
    for index in (0, 1, 3):
        getattr(*prunable(model)[{0: 0, 1: 1, 3: 2}[index]]).data.fill_(1.0)
        model[index].bias.data.zero_()
    set_masks(model, {"0": KEEP.view(2, 1, 1, 3), "3": torch.tensor([[1] * 6, [0] * 6, [1, 0, 0, 0, 0, 1]])})
    # Channel 0 sees x[i] + x[i+2], channel 1 x[i+1] + x[i+2]; the 1x1 layer adds them; the mask of the last picks.
    assert torch.equal(model[0](X), torch.tensor([[[[4.0, 6.0]], [[5.0, 7.0]]]]))
    assert torch.equal(model(X), torch.tensor([[3 * (9.0 + 13.0), 0.0, 9.0 + 13.0]]))
    assert list(masks(model)) == ["0", "3"]


def test_what_is_set_is_what_is_read(model: nn.Sequential) -> None:
    chosen = {"0": KEEP.view(2, 1, 1, 3), "1": torch.tensor([[1.0, 0], [0, 1], [1, 1]]).view(3, 2, 1, 1)}
    assert set_masks(model, chosen) is model
    found = masks(model)
    assert list(found) == ["0", "1"] and all(mask.dtype == torch.bool for mask in found.values())
    assert all(torch.equal(found[name], mask.bool()) for name, mask in chosen.items())
    # `set_masks` replaces earlier masks.
    set_masks(model, {"0": ~KEEP.view(2, 1, 1, 3)})
    assert torch.equal(masks(model)["0"], ~KEEP.view(2, 1, 1, 3)) and torch.equal(masks(model)["1"], found["1"])


def test_what_is_written_into_a_mask_of_ones_is_seen() -> None:
    model = interspace(network())  # a converted model has masks from the start
    before = model[0](X)
    buffers = dict(model.named_buffers())
    for name in ("0", "1"):  # in the interspace, and not
        buffers[f"{name}.parametrizations.weight.0.mask"][1] = False
    after = model[0](X)
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 1], model[0].bias[1].expand_as(after[:, 1]))
    assert not bool(model[1].weight[1].any()) and bool(model[1].weight[0].all())
    assert {name: mask.flatten(1).all(1).tolist() for name, mask in masks(model).items()} == {
        "0": [True, False], "1": [True, False, True],
    }  # fmt: skip


def test_masks_are_copies(model: nn.Sequential) -> None:
    mine = KEEP.view(2, 1, 1, 3).clone()
    set_masks(model, {"0": mine})
    masks(model)["0"].fill_(False)
    mine.fill_(False)
    assert torch.equal(masks(model)["0"], KEEP.view(2, 1, 1, 3))


def test_values_behind_a_mask_stay_and_come_back_with_it(model: nn.Sequential) -> None:
    expected = model(X)
    set_masks(model, {"0": KEEP.view(2, 1, 1, 3)})
    assert not torch.equal(model(X), expected)
    set_masks(model, {"0": torch.ones(2, 1, 1, 3)})
    assert torch.equal(model(X), expected)


def test_the_parameter_is_the_same_object_with_and_without_a_mask(model: nn.Sequential) -> None:
    before = {id(parameter) for parameter in model.parameters()}
    set_masks(model, {name: torch.ones(getattr(*t).shape) for name, t in zip("013", prunable(model), strict=True)})
    assert {id(parameter) for parameter in model.parameters()} == before


def test_masks_move_copy_and_save_with_the_model(model: nn.Sequential) -> None:
    set_masks(model, {"0": KEEP.view(2, 1, 1, 3), "3": torch.rand(3, 6) < 0.5})
    moved = copy.deepcopy(model).double()
    assert masks(moved)["0"].dtype == torch.bool
    torch.testing.assert_close(moved(X.double()).float(), model(X))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    # A parametrized model allocates masks that it does not have yet.
    fresh = set_masks(copy.deepcopy(model), {"0": torch.ones(2, 1, 1, 3), "3": torch.ones(3, 6)})
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(mask, masks(fresh)[name]) for name, mask in masks(model).items())


def test_an_interspace_model_without_masks_takes_them_from_a_state_dict() -> None:
    pruned = set_masks(interspace(network()), {"0": KEEP.view(2, 1, 1, 3)})
    fresh = interspace(network())
    fresh.load_state_dict(pruned.state_dict(), strict=True)
    assert torch.equal(masks(fresh)["0"], KEEP.view(2, 1, 1, 3))
    assert torch.equal(fresh(X), pruned(X))


def test_a_dense_state_dict_leaves_the_masks_as_in_a_lottery_ticket(model: nn.Sequential) -> None:
    dense = network().state_dict()
    set_masks(model, {"0": KEEP.view(2, 1, 1, 3), "3": torch.rand(3, 6) < 0.5})
    train(model, X)
    before = masks(model)
    model.load_state_dict(dense, strict=True)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    rewound = set_masks(network(), before)
    rewound.load_state_dict(dense)
    torch.testing.assert_close(model[3](X.new_ones(1, 6)), rewound[3](X.new_ones(1, 6)))


def test_a_state_dict_without_the_masks_is_missing_keys() -> None:
    state = {k: v for k, v in interspace(network()).state_dict().items() if not k.endswith("mask")}
    pruned = set_masks(interspace(network()), {"0": KEEP.view(2, 1, 1, 3)})
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.0\.mask"):
        pruned.load_state_dict(state)
    pruned.load_state_dict(state, strict=False)
    assert torch.equal(masks(pruned)["0"], KEEP.view(2, 1, 1, 3))


def test_masks_of_the_host_are_read_and_applied(model: nn.Sequential) -> None:
    for where, amount in zip(prunable(model), (2, 1, 5), strict=True):
        host.l1_unstructured(*where, amount=amount)
    host.l1_unstructured(model[0], "bias", amount=1)
    assert {name: int((~mask).sum()) for name, mask in masks(model).items()} == {"0": 2, "1": 1, "3": 5}
    expected = model(X)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert [name for name, _ in bake(model).named_parameters()] == names
    assert torch.equal(model(X), expected)
    assert not host.is_pruned(model) and int((model[0].bias == 0).sum()) == 1
    assert int((model[3].weight == 0).sum()) == 5
    torch.save(model, io.BytesIO())


def test_adopted_masks_do_what_the_host_did(model: nn.Sequential) -> None:
    parameters = {id(parameter) for parameter in model.parameters()}
    values = {id(p): p.detach().clone() for p in model.parameters()}
    for where, amount in zip(prunable(model), (2, 1, 5), strict=True):
        host.l1_unstructured(*where, amount=amount)
    expected, before = backward(model, X), masks(model)
    gradients = {id(p): p.grad for p in model.parameters()}
    assert adopt_masks(model) is model
    assert not host.is_pruned(model)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    assert torch.equal(backward(copy.deepcopy(model), X), expected)
    assert torch.equal(backward(model, X), expected)
    assert {id(p) for p in model.parameters()} == parameters
    for parameter in model.parameters():
        assert torch.equal(parameter, values[id(parameter)])  # unmasked, as the host's weight_orig
        assert torch.equal(parameter.grad, gradients[id(parameter)])


def test_our_mask_and_the_hosts_keep_what_both_keep(model: nn.Sequential) -> None:
    set_masks(model, {"3": torch.tensor([[1] * 6, [0] * 6, [1] * 6])})
    host.custom_from_mask(*prunable(model)[2], mask=torch.tensor([[1, 0, 1, 0, 1, 0]] * 3))
    expected = torch.tensor([[1, 0, 1, 0, 1, 0], [0] * 6, [1, 0, 1, 0, 1, 0]]).bool()
    assert torch.equal(masks(model)["3"], expected)
    output = model(X)
    assert torch.equal(masks(adopt_masks(model))["3"], expected)
    assert torch.equal(model(X), output)
    assert torch.equal(bake(model)[3].weight != 0, expected)


def test_setting_masks_replaces_the_hosts(model: nn.Sequential) -> None:
    host.l1_unstructured(*prunable(model)[2], amount=5)
    chosen = torch.rand(3, 6) < 0.5
    set_masks(model, {"3": chosen})
    assert torch.equal(masks(model)["3"], chosen) and not host.is_pruned(model)


def test_host_masks_load_with_a_dense_state_dict_into_the_interspace() -> None:
    dense = network()
    model = interspace(network(), basis="dct")
    host.l1_unstructured(*prunable(model)[0], amount=2)
    model.load_state_dict(dense.state_dict())
    assert int((~masks(model)["0"]).sum()) == 2
    set_masks(model, {"0": torch.ones(2, 1, 1, 3)})
    torch.testing.assert_close(model[0].weight, dense[0].weight)


def test_masked_entries_stay_pruned_under_momentum_and_weight_decay(model: nn.Sequential) -> None:
    set_masks(model, {"0": KEEP.view(2, 1, 1, 3), "3": torch.rand(3, 6) < 0.5})
    train(model, X, steps=5)
    baked = bake(copy.deepcopy(model))
    assert torch.equal(baked(X), model(X))
    assert not baked[3].weight[~masks(model)["3"]].any()
