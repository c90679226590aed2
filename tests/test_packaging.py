"""The wheel, built, installed into an empty environment and used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import importlib.metadata, importlib.resources, json, sys
import torch, ip_plugin, ip_plugin.adapters
from ip_plugin.adapters import torch_prune as prune

assert ip_plugin.__file__.startswith(sys.prefix), ip_plugin.__file__
assert prune.__file__.startswith(sys.prefix), prune.__file__
assert importlib.resources.files("ip_plugin").joinpath("py.typed").is_file()
assert importlib.resources.files("ip_plugin.compare").joinpath("report.html.j2").is_file()
assert importlib.metadata.version("ip-plugin") == ip_plugin.__version__
assert ip_plugin.adapters.hosts()["torch"].load().CRITERIA

def build():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))

model = build()
x = torch.randn(2, 3, 3, 3)
expected = model(x)
assert torch.equal(ip_plugin.interspace(model)(x), expected)
prune.global_unstructured(ip_plugin.prunable(model), prune.L1Unstructured, amount=100)
assert ip_plugin.report(model).prunable.nonzeros == 132
ip_plugin.save(model, "model.safetensors")
loaded = ip_plugin.load(build(), "model.safetensors")
assert torch.equal(ip_plugin.bake(loaded)(x), ip_plugin.bake(model)(x))
print("used")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources (building leaves traces beside them)."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("ip_plugin", "adapters"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    subprocess.run(build, cwd=sources, check=True, capture_output=True, timeout=240)
    (found,) = out.iterdir()
    return found


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files} == {"ip_plugin", f"{wheel.name.split('-py3')[0]}.dist-info"}
    sources = {
        str(p.relative_to(ROOT)) for p in (ROOT / "ip_plugin").rglob("*") if p.suffix in (".py", ".j2", ".typed")
    }
    sources |= {f"ip_plugin/{p.relative_to(ROOT)}" for p in (ROOT / "adapters").rglob("*.py")}
    assert {name for name in files if name.startswith("ip_plugin/")} == sources


def test_the_metadata_name_extras_and_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"torch-pruning", "nni", "lightning", "compare", "all", "test"} <= set(metadata.get_all("Provides-Extra"))
    plain = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.split(">")[0] for r in plain) == ["rich", "safetensors[torch]", "torch"]


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    # torch is too large to be installed again: it is found behind what was installed here.
    (purelib,) = environment.glob("lib/python*/site-packages")
    (purelib / "torch_is_there.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run([python, "-c", USE], cwd=elsewhere, env=clean, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and run.stdout == "used\n", run.stderr
    command = [environment / "bin" / "ip-plugin", "criteria"]
    run = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0 and "torch:l1" in run.stdout, run.stderr


def test_the_version_is_one(wheel: Path) -> None:
    import ip_plugin

    assert wheel.name.startswith(f"ip_plugin-{ip_plugin.__version__}-")
    assert f"## [{ip_plugin.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
