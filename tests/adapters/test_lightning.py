"""Lightning's ModelPruning in either space, with a real Trainer."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelPruning as Host  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

from ip_plugin import bake, interspace, masks, prunable, report  # noqa: E402
from ip_plugin.adapters import torch_prune  # noqa: E402
from ip_plugin.adapters.lightning import ModelPruning  # noqa: E402

pytestmark = pytest.mark.contract


class Module(lightning.LightningModule):
    def __init__(self, space: str = "spatial", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
        if space == "interspace":
            interspace(self.network, **options)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(module: Module, *callbacks: Any, epochs: int = 2, folder: Path | None = None) -> None:
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(16, 1, 8, 8), torch.arange(16) % 3)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks), default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    if folder is not None:
        trainer.save_checkpoint(folder / "last.ckpt")


def weights(module: Module) -> list[tuple[nn.Module, str]]:
    return [(module.network[i], "weight") for i in (0, 2, 4)]


def targets(module: Module) -> list[tuple[nn.Module, str]]:
    return list(prunable(module))


@pytest.mark.filterwarnings("ignore")
class TestModelPruning:
    def test_the_host_refuses_targets_and_that_is_why(self) -> None:
        module = Module("interspace")
        with pytest.raises(MisconfigurationException, match="missing modules"):
            fit(module, Host("l1_unstructured", parameters_to_prune=targets(module)))

    @pytest.mark.parametrize("pairs", [weights, targets])
    @pytest.mark.parametrize("space", ["spatial", "interspace"])
    @pytest.mark.parametrize("everywhere", [True, False])
    def test_it_prunes_what_it_is_given(self, pairs: Any, space: str, everywhere: bool) -> None:
        module = Module(space)
        fit(
            module,
            ModelPruning(
                "l1_unstructured", parameters_to_prune=pairs(module), amount=0.5, use_global_unstructured=everywhere,
                use_lottery_ticket_hypothesis=False, make_pruning_permanent=False,
            ),
        )  # fmt: skip
        found = report(module)
        assert found.prunable.nonzeros == pytest.approx(found.prunable.parameters / 4, abs=4)
        assert set(masks(module)) == {"network.0", "network.2", "network.4"}
        assert copy.deepcopy(module.network)(torch.randn(1, 1, 8, 8)).shape == (1, 3)

    @pytest.mark.parametrize("options", [
        {}, {"use_global_unstructured": False}, {"pruning_fn": "random_unstructured"},
        {"pruning_fn": "ln_structured", "use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 2,
         "parameter_names": ["weight"]},
        {"pruning_fn": torch_prune.L1Unstructured}, {"use_lottery_ticket_hypothesis": True},
    ])  # fmt: skip
    def test_a_plain_model_and_its_standard_twin_are_pruned_as_by_the_host(self, options: dict[str, Any]) -> None:
        arguments = {"pruning_fn": "l1_unstructured", "amount": 0.4, "use_lottery_ticket_hypothesis": False, **options}
        found = []
        for callback, space in ((Host, "spatial"), (ModelPruning, "spatial"), (ModelPruning, "interspace")):
            module = Module(space, **({"train_basis": False} if space == "interspace" else {}))
            # One epoch: a second pruning by the host goes by the weights of the last forward pass, one step behind.
            fit(module, callback(**arguments), epochs=1)
            found.append(bake(module.network).state_dict())
        for other in found[1:]:
            for name, tensor in found[0].items():
                torch.testing.assert_close(other[name], tensor, msg=lambda m, name=name: f"{name}: {m}")

    def test_lottery_tickets_rewind_coefficients_and_basis(self) -> None:
        module = Module("interspace", basis="orthonormal", sharing="model")
        first = {name: p.detach().clone() for name, p in module.named_parameters()}
        prune = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5, make_pruning_permanent=False)
        fit(module, prune)
        kept = {f"{name}.parametrizations.weight.original": mask for name, mask in masks(module).items()}
        rewound = {name.replace("network.4.weight", "network.4.parametrizations.weight.original") for name in first}
        for name, parameter in module.named_parameters():
            if name in kept or name.endswith("basis"):
                before = first.get(name, first.get("network.4.weight"))
                assert torch.equal(parameter, before), name
            assert name in rewound
        assert sum(int((~mask).sum()) for mask in kept.values()) > 0

    def test_lottery_tickets_can_be_drawn_anew(self) -> None:
        module = Module("interspace", basis="orthonormal")
        first = module.network[0].weight.detach().clone()
        basis = module.network[0].parametrizations.weight[0].basis.detach().clone()
        fit(
            module,
            ModelPruning("l1_unstructured", amount=0.01, resample_parameters=True, make_pruning_permanent=False),
            epochs=1,
        )
        assert torch.equal(module.network[0].parametrizations.weight[0].basis, basis)
        baked = bake(copy.deepcopy(module.network))[0].weight
        assert not torch.allclose(baked, first, atol=1e-2)
        assert baked.abs().max() <= 1 / 3 * 1.2  # the bound of the layer's own initialisation, but for what is pruned

    @pytest.mark.parametrize("permanent", [True, False])
    @pytest.mark.parametrize("space", ["spatial", "interspace"])
    def test_checkpoints_load_into_a_model_that_is_not_pruned(
        self, space: str, permanent: bool, tmp_path: Path
    ) -> None:
        module = Module(space)
        callback = ModelPruning(
            "l1_unstructured", amount=0.5, make_pruning_permanent=permanent, use_lottery_ticket_hypothesis=False
        )
        fit(module, callback, folder=tmp_path)
        assert torch_prune.is_pruned(module) != permanent
        state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
        fresh = Module(space)
        if not permanent and space == "spatial":  # its masks are in it, and nothing has converted the fresh model
            with pytest.raises(RuntimeError, match="parametrizations"):
                fresh.load_state_dict(state)
            return
        fresh.load_state_dict(state, strict=True)
        x = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(fresh.network(x), module.network(x))

    def test_a_checkpoint_in_the_middle_of_training_holds_no_masks(self, tmp_path: Path) -> None:
        for space in ("spatial", "interspace"):
            saved: dict[str, torch.Tensor] = {}

            class Save(lightning.Callback):
                def on_train_epoch_start(self, trainer: Any, module: Any, saved: Any = saved) -> None:
                    if trainer.current_epoch == 1:
                        trainer.save_checkpoint(tmp_path / "middle.ckpt")
                        saved.update(
                            {k: v.clone() for k, v in bake(copy.deepcopy(module.network)).state_dict().items()}
                        )

            module = Module(space)
            fit(module, ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False), Save())
            state = torch.load(tmp_path / "middle.ckpt", weights_only=False)["state_dict"]
            assert not any("mask" in name for name in state)
            fresh = Module(space)
            fresh.load_state_dict(state, strict=True)
            for name, tensor in bake(fresh.network).state_dict().items():
                torch.testing.assert_close(tensor, saved[name])

    def test_it_logs_the_sparsity(self, caplog: pytest.LogCaptureFixture) -> None:
        module = Module("interspace")
        with caplog.at_level(logging.INFO):
            fit(
                module,
                ModelPruning("l1_unstructured", parameters_to_prune=targets(module), amount=30, verbose=2),
                epochs=1,
            )
        assert "Pruned: 0/372 (0.00%) -> 30/372 (8.06%)" in caplog.text
        messages = [record.getMessage() for record in caplog.records if "Applied" in record.getMessage()]
        assert len(messages) == 1 + len(targets(module)) and not any("\n" in message for message in messages)
        plain = repr(bake(copy.deepcopy(module.network))[0])
        assert f"Applied `L1Unstructured` to `{plain}.weight` with amount=30" in messages[1]
        assert re.search(r"Pruned: 0 \(0\.00%\) -> \d+ \(\d", messages[1])
