"""`import ip_plugin` imports torch and nothing optional."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.contract

OPTIONAL = ["torchvision", "torch_pruning", "nni", "lightning", "pytorch_lightning", "sklearn", "scipy", "matplotlib"]
OPTIONAL += ["safetensors", "rich", "typer", "jinja2", "filelock", "pandas", "numba", "ip_plugin.adapters.torch_prune"]


def newly_imported(statement: str) -> list[str]:
    """What a statement imports in a fresh process, beyond what torch imports by itself."""
    script = f"""
import sys, torch
before = set(sys.modules)
{statement}
print(*sorted(set(sys.modules) - before))
"""
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    return run.stdout.split()


def test_importing_imports_nothing_optional() -> None:
    imported = newly_imported(
        "import ip_plugin.adapters, ip_plugin.compare.engines.nni, ip_plugin.methods\n"
        "from ip_plugin.adapters.shared import batch_norms, plain_view, transaction"
    )
    assert {"ip_plugin", "ip_plugin.compare", "ip_plugin.methods"} <= set(imported)
    assert [name for name in OPTIONAL if name in imported] == []


def test_the_test_above_can_fail() -> None:
    assert {"rich", "ip_plugin.adapters.torch_prune"} <= set(
        newly_imported("import rich, ip_plugin.adapters.torch_prune")
    )
