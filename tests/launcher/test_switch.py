"""Code that knows nothing of the interspace, switched on: equal to code changed by hand, and no trace is left."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ip_plugin
from ip_plugin import errors, interspace, masks, report
from ip_plugin.adapters import torch_prune
from ip_plugin.core.tensor_ref import TensorRef


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    )


X, Y = torch.randn(8, 1, 8, 8), torch.arange(8)


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    ip_plugin.switch_off()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def pairs(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def script(prune: Any = None, convert: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    """Train, prune one by one and together, by a method of one's own, fine-tune; as it is, written for torch alone."""
    if prune is None:
        from torch.nn.utils import prune

    class EveryThird(prune.BasePruningMethod):  # type: ignore[name-defined,misc]
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            mask = default_mask.clone()
            mask.view(-1)[::3] = 0
            return mask

    model: Any = convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, 2)
    prune.global_unstructured(pairs(model), prune.L1Unstructured, amount=0.5)
    step(model, optimizer, 2)
    for module, name in pairs(model):
        prune.l1_unstructured(module, name, amount=0.2)
    EveryThird.apply(model[3], "weight")
    prune.ln_structured(model[0], "weight", amount=1, n=2, dim=0)
    step(model, optimizer, 2)
    return model


@pytest.mark.parametrize("options", [{}, {"basis": "dct", "sharing": "model"}], ids=["standard", "dct"])
def test_a_script_for_torch_equals_the_one_changed_by_hand(options: dict[str, Any]) -> None:
    with ip_plugin.switched_on(quiet=True, **options):
        switched = script()
    changed = script(torch_prune, partial(interspace, **options))
    torch.testing.assert_close(switched.eval()(X), changed.eval()(X), rtol=0, atol=0 if not options else 1e-5)
    for name, mask in masks(changed).items():
        assert torch.equal(mask, masks(switched)[name])


def test_in_the_control_run_nothing_changes() -> None:
    plain = script()
    with ip_plugin.switched_on(space="spatial", quiet=True):
        control = script()
    assert type(control[0]) is nn.Conv2d
    assert torch.equal(plain.eval()(X), control.eval()(X))


def test_conversion_can_wait_for_the_pruning() -> None:
    with ip_plugin.switched_on(convert_at="pruning", quiet=True):
        from torch.nn.utils import prune

        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step(model, optimizer)
        assert type(model[0]) is nn.Conv2d
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        held = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert all(id(model[i].parametrizations.weight[0].basis) in held for i in (0, 3))


def test_layers_of_no_model_are_converted_by_themselves_and_cannot_share() -> None:
    from torch.nn.utils import prune as host

    layers = [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)]
    with ip_plugin.switched_on(quiet=True):
        from torch.nn.utils import prune

        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.5)
    assert all(report(layer).rows[0].space == "interspace" for layer in layers)
    layers = [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)]
    with ip_plugin.switched_on(quiet=True, sharing="model"):
        from torch.nn.utils import prune

        with pytest.raises(errors.SelectionError, match="2 layers that belong to no module"):
            prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.5)
    assert all(type(layer) is nn.Conv2d and not host.is_pruned(layer) for layer in layers)


def test_large_kernels_whose_basis_would_not_pay_stay_spatial(capsys: pytest.CaptureFixture[str]) -> None:
    for layers, converted in (((), [False, True]), (("*",), [True, True])):
        model = nn.Sequential(nn.Conv1d(1, 4, 64), nn.Conv1d(4, 4, 3))
        with ip_plugin.switched_on(layers=layers):
            for _ in range(2):
                torch.optim.SGD(model.parameters(), lr=0.1)
        assert [hasattr(layer, "parametrizations") for layer in model] == converted
    assert capsys.readouterr().err.count("'0' stay spatial") == 1


def test_patterns_select_layers() -> None:
    with ip_plugin.switched_on(quiet=True, layers=["3"]):
        model = network()
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert [row.space for row in report(model).rows] == ["spatial", "interspace", "spatial"]


@pytest.mark.parametrize("kind", ["groups", "named", "generator", "head only"])
def test_every_way_to_build_an_optimizer(kind: str) -> None:
    model = network()
    with ip_plugin.switched_on(quiet=True):
        if kind == "groups":
            groups = [{"params": (p for p in model[:4].parameters()), "lr": 0.01}, {"params": model[5].parameters()}]
            optimizer = torch.optim.Adam(groups)
        elif kind == "named":
            optimizer = torch.optim.Adam(model.named_parameters())
        elif kind == "generator":
            optimizer = torch.optim.Adam(p for p in model.parameters())
        else:
            optimizer = torch.optim.Adam(model[5].parameters())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in (model[5] if kind == "head only" else model).parameters()}
    assert all(len(g.get("param_names", g["params"])) == len(g["params"]) for g in optimizer.param_groups)
    assert report(model).rows[0].space == ("spatial" if kind == "head only" else "interspace")


def test_a_missed_basis_joins_at_the_first_step_without_its_gradient() -> None:
    with ip_plugin.switched_on(quiet=True) as session:
        model = network()
        session.convert(model)  # as a wrapper does
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.dim() != 2 or len(p) == 10], lr=0.1)
        basis = model[0].parametrizations.weight[0].basis
        before = basis.detach().clone()
        optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not basis]
        step(model, optimizer)
        assert torch.equal(basis, before)
        step(model, optimizer)
        assert not torch.equal(basis, before)


@pytest.mark.parametrize("sharing", ["layer", "model"])
def test_what_is_saved_loads_into_the_plain_network_and_exactly_into_the_run(sharing: Any) -> None:
    with ip_plugin.switched_on(quiet=True, basis="dct", sharing=sharing):
        model = script()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step(model, optimizer)
        files = [io.BytesIO() for _ in range(3)]
        torch.save(model.state_dict(), files[0])
        torch.save(model, files[1])
        torch.save({"model": [model.state_dict()], "optimizer": optimizer.state_dict(), "epoch": 3}, files[2])
        for file in files:
            file.seek(0)
        outputs = copy.deepcopy(model).eval()(X)
        step(model, optimizer, 3)
        model.load_state_dict(torch.load(files[0]))
        assert torch.equal(model.eval()(X), outputs)
        model.train()
        step(model, optimizer)

        resumed = network()  # in a new process: a new model, the optimizer, then the checkpoint
        again = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
        checkpoint = torch.load(files[2])
        resumed.load_state_dict(checkpoint["model"][0])
        again.load_state_dict(checkpoint["optimizer"])
        step(resumed, again)
        assert checkpoint["epoch"] == 3
        first = network()  # the checkpoint before the optimizer
        first.load_state_dict(checkpoint["model"][0])
        assert torch.equal(first.eval()(X), outputs)
        assert all(torch.equal(mask, masks(first)[name]) for name, mask in masks(model).items())
        model.load_state_dict(checkpoint["model"][0])
        step(model.train(), optimizer)
    files[0].seek(0)
    plain = network()
    plain.load_state_dict(torch.load(files[0]))
    assert list(torch.load(io.BytesIO(files[0].getvalue())))[:2] == ["0.weight", "0.bias"]
    whole = torch.load(files[1], weights_only=False)
    assert type(whole[0]) is nn.Conv2d
    assert not whole[0]._forward_pre_hooks
    for each in (plain, whole):
        torch.testing.assert_close(each.eval()(X), outputs)


@pytest.mark.parametrize("from_file", [False, True])
def test_a_state_from_before_the_pruning_rewinds_and_masks_stay(from_file: bool, tmp_path: Path) -> None:
    with ip_plugin.switched_on(quiet=True, basis="dct"):
        from torch.nn.utils import prune

        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        early: Any = copy.deepcopy(model.state_dict())
        if from_file:
            torch.save(model.state_dict(), tmp_path / "early.pt")
            early = torch.load(tmp_path / "early.pt")
        start = copy.deepcopy(model)
        step(model, optimizer, 3)
        prune.global_unstructured(pairs(model), prune.L1Unstructured, amount=0.5)
        prune.l1_unstructured(model[3], "bias", amount=2)
        kept = masks(model)
        if from_file:  # linear layers: a state dict in memory has the keys of the model that it is loaded into
            model.load_state_dict(early)
        else:
            model.load_state_dict(early, strict=False)
        for name, mask in masks(model).items():
            assert torch.equal(mask, kept[name])
        for index in (0, 3):
            now, then = (m[index].parametrizations.weight for m in (model, start))
            assert torch.equal(now.original, then.original)
            assert torch.equal(now[0].basis, then[0].basis)
        assert torch.equal(model[5].weight, start[5].weight * kept["5"])


def test_masks_of_biases_are_restored() -> None:
    with ip_plugin.switched_on(quiet=True):
        from torch.nn.utils import prune

        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, optimizer)
        prune.l1_unstructured(model[3], "bias", amount=2)
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        resumed = network()
        resumed.load_state_dict(torch.load(file))
        restored, mask = (TensorRef(m[3], "bias").mask for m in (resumed, model))
        assert restored is not None and mask is not None
        assert torch.equal(restored, mask)
        assert torch.equal(resumed.eval()(X), model.eval()(X))
    file.seek(0)
    plain = network()
    plain.load_state_dict(torch.load(file))
    assert int((plain[3].bias == 0).sum()) == 2


def test_a_model_that_the_script_bakes_is_saved_without_a_trace(tmp_path: Path) -> None:
    with ip_plugin.switched_on(quiet=True):
        torch.save(ip_plugin.bake(script()), tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not any(module._forward_pre_hooks for module in whole.modules())


def test_gradients_may_be_accumulated_and_scaled() -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            for half in (slice(0, 4), slice(4, 8)):
                scaler.scale(F.cross_entropy(model(X[half]), Y[half]) / 2).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model.eval()

    with ip_plugin.switched_on(quiet=True):
        model = network()
        switched = train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    changed = interspace(network())
    train(changed, torch.optim.SGD(changed.parameters(), lr=0.1, momentum=0.9))
    torch.testing.assert_close(switched(X), changed(X))


def test_a_compiled_model_is_converted_inside() -> None:
    with ip_plugin.switched_on(quiet=True):
        model = network()
        compiled: Any = torch.compile(model, backend="eager")
        compiled(X)
        step(compiled, torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9), 2)
    assert report(model).rows[0].space == "interspace"
    changed = network()
    changed(X)
    step(interspace(changed), torch.optim.SGD(changed.parameters(), lr=0.1, momentum=0.9), 2)
    torch.testing.assert_close(model.eval()(X), changed.eval()(X))


def test_a_model_that_was_wrapped_before_is_refused() -> None:
    wrapped = nn.DataParallel(network())
    with ip_plugin.switched_on(quiet=True), pytest.raises(errors.ConversionError, match=r"interspace\(model\) first"):
        torch.optim.SGD(wrapped.parameters(), lr=0.1)
    assert type(wrapped.module[0]) is nn.Conv2d


def test_it_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    with ip_plugin.switched_on(quiet=True, basis="orthonormal"):
        model = network()
        after_building = torch.get_rng_state()
        torch.optim.SGD(model.parameters(), lr=0.1)
        assert torch.equal(torch.get_rng_state(), after_building)
    torch.set_rng_state(state)
    ip_plugin.switch_on(quiet=True, basis="orthonormal")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dense_dict_that_masks_do_not_allow_is_told() -> None:
    with ip_plugin.switched_on(quiet=True):
        model = script()
        dense = network().state_dict()
        with pytest.warns(UserWarning, match=r"2 pruned layers \(the first is '0'\)"):
            model.load_state_dict(dict(dense))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh = network()
            torch.optim.SGD(fresh.parameters(), lr=0.1)
            fresh.load_state_dict(dense)


def test_averages_that_are_built_before_the_optimizer() -> None:
    with ip_plugin.switched_on(quiet=True):
        model = network()
        average = AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, optimizer)
        average.update_parameters(model)
    torch.testing.assert_close(average.module.eval()(X), model.eval()(X))


def test_hooks_tell_what_has_pruned_a_tensor_until_it_is_removed() -> None:
    with ip_plugin.switched_on(quiet=True):
        from torch.nn.utils import prune

        model = network()
        prune.random_unstructured(model[0], "weight", amount=0.3)
        prune.ln_structured(model[0], "weight", amount=2, n=2, dim=0)
        prune.l1_unstructured(model[0], "bias", amount=1)
        weight, bias = model[0]._forward_pre_hooks.values()
        assert [type(method) for method in weight] == [prune.RandomUnstructured, prune.LnStructured]
        assert (weight._tensor_name, bias._tensor_name) == ("weight", "bias")
        assert prune.is_pruned(model)
        prune.remove(model[0], "weight")
        assert list(model[0]._forward_pre_hooks.values()) == [bias]


def test_exports_get_a_baked_copy() -> None:
    with ip_plugin.switched_on(quiet=True):
        model = script().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced, scripted = torch.jit.trace(model, X), torch.jit.script(model)
            buffer = io.BytesIO()
            torch.onnx.export(model, (X,), buffer, dynamo=False)
        assert report(model).rows[0].space == "interspace"
    for exported in (traced, scripted):
        torch.testing.assert_close(exported(X), model(X))
    assert len(buffer.getvalue()) > 1000


def test_nothing_is_left_after_it() -> None:
    import lightning.pytorch.callbacks as callbacks
    import nni.compression.pruning
    import nni.compression.speedup
    import torch_pruning
    from torch.nn.utils import prune

    namespaces = [
        torch, torch.nn.utils, nn.Module, torch.optim.Optimizer, torch.jit, torch.onnx, prune, torch_prune, callbacks,
        torch_prune.BasePruningMethod, nni.compression.pruning, nni.compression.speedup, torch_pruning,
        torch_pruning.pruner, torch_pruning.utils, AveragedModel, nn.DataParallel, sys.modules[__name__],
    ]  # fmt: skip
    before = [dict(vars(each)) for each in namespaces]
    modules, finders = dict(sys.modules), list(sys.meta_path)
    ip_plugin.switch_on(quiet=True)
    assert sys.modules["torch.nn.utils.prune"] is torch.nn.utils.prune is not prune
    assert torch_pruning.MetaPruner is not before[12]["MetaPruner"]
    ip_plugin.switch_off()
    for each, names in zip(namespaces, before, strict=True):
        assert [name for name in names | vars(each) if vars(each).get(name) is not names.get(name)] == []
    assert sys.modules["torch.nn.utils.prune"] is modules["torch.nn.utils.prune"]
    assert sys.meta_path == finders
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks


def test_importing_the_package_changes_nothing_of_torch() -> None:
    code = (
        "import torch, sys; from torch.nn.utils import prune; import torch.optim as o\n"
        "spaces = [torch, torch.nn.Module, o.Optimizer, torch.nn.utils, prune]\n"
        "before = [dict(vars(s)) for s in spaces]\n"
        "import ip_plugin\n"
        "assert all(vars(s)[k] is v for s, b in zip(spaces, before) for k, v in b.items())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sharing": "stage"}, "`sharing` must be one of 'layer', 'model'"),
        ({"convert_at": "end"}, "'end'"),
        ({"basis": "fourier"}, "'fourier'"),
        ({"constraint": "small"}, "'small'"),
        ({"space": "IP"}, "'IP'"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_switched(options: dict[str, Any], match: str) -> None:
    build = torch.optim.Optimizer.__init__
    with pytest.raises(errors.InterspaceError, match=match):
        ip_plugin.switch_on(**options)
    assert torch.optim.Optimizer.__init__ is build


def test_it_is_switched_on_once() -> None:
    ip_plugin.switch_on(quiet=True)
    with pytest.raises(errors.HostError, match="switched on already"):
        ip_plugin.switch_on()


def test_lines_about_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    with ip_plugin.switched_on():
        script()
        torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[ip-plugin] Sequential: 2 layers converted (standard basis), 2 bases with 162 numbers added"
    assert "pruned by L1Unstructured(amount=0.5): 50.00% of 910 prunable numbers are zero" in lines[1]
    assert "pruned by LnStructured(amount=1, n=2, dim=0)" in lines[2]
    assert "at the end" in lines[3]
    assert len(lines) == 4


def test_a_schedule_that_prunes_nothing_more_prints_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    with ip_plugin.switched_on():
        from torch.nn.utils import prune

        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            prune.l1_unstructured(model[3], "weight", amount=0)
            step(model, optimizer)
    assert capsys.readouterr().err.count("pruned by L1Unstructured(amount=0)") == 1
