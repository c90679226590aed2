"""`import ip_plugin` imports torch and nothing optional."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    "statement",
    [
        "import ip_plugin",
        "import ip_plugin.adapters",
        "import ip_plugin.compare",
        "import ip_plugin.methods",
        "import ip_plugin.compare.nni_engine",
        "from ip_plugin.adapters import batch_norms, channels, cut, plain_view, transaction",
    ],
)
def test_importing_imports_nothing_optional(statement: str) -> None:
    imported = newly_imported(statement)
    assert "ip_plugin" in imported
    assert [name for name in OPTIONAL if name in imported] == []


@pytest.mark.parametrize("name", ["rich", "sklearn", "ip_plugin.adapters.torch_prune"])
def test_the_test_above_can_fail(name: str) -> None:
    assert name in newly_imported(f"import {name}")
