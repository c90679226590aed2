"""The public names. A change here is a change for users: say so in CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect

import pytest

from ip_plugin import errors

NAMES = {
    "ip_plugin": """Report adopt_masks bake errors interspace join_optimizer load masks normalize param_groups prunable
        report save set_masks switch_off switch_on switched_on""",
    "ip_plugin.methods": """SET Batches Gradual Loss LotteryTicket Masks Movement NofM RigL Scope Score Scores
        Sensitivity apply_masks erk grasp lamp magnitude movement prune prune_fitted random ranks reconstruct
        reestimate_batch_norm refine select sensitivity snip synflow""",
    "ip_plugin.sparse": "Run SparseNetwork prepare",
    "ip_plugin.adapters.torch_prune": """BasePruningMethod CustomFromMask Identity L1Unstructured LnStructured
        PruningContainer RandomStructured RandomUnstructured custom_from_mask global_unstructured identity is_pruned
        l1_unstructured ln_structured random_structured random_unstructured remove""",
    "ip_plugin.adapters.torch_pruning": """ScoredImportance VariedImportance count_ops_and_params cut_masked_channels
        plain_layers pruner""",
    "ip_plugin.adapters.nni": """AGPPruner ChannelDependency FPGMPruner GroupDependency InputChannelDependency
        L1NormPruner L2NormPruner LevelPruner LightningEvaluator LinearPruner MovementPruner ReshapeDependency
        SlimPruner TaylorPruner TorchEvaluator auto_set_denpendency_group_ids compute_sparsity_compact2origin
        compute_sparsity_mask2compact config_list count_flops_params finish plain_layers speedup""",
}
ERRORS = """AmountError ArgumentError BasisError BatchError CheckpointError ConversionError HostError InterspaceError
    LayerCollapseWarning MaskError OptimizerError ScoreError SelectionError SparseExecutionError SparseFallbackWarning
    StudyError"""


@pytest.mark.parametrize("module", NAMES)
def test_a_package_offers_these_names_and_no_others(module: str) -> None:
    package = importlib.import_module(module)
    assert sorted(package.__all__) == sorted(NAMES[module].split())
    assert all(hasattr(package, name) for name in package.__all__)


def test_lightning_offers_its_callback() -> None:
    assert inspect.isclass(importlib.import_module("ip_plugin.adapters.lightning").ModelPruning)


def test_errors_are_these() -> None:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert set(ERRORS.split()) <= classes
