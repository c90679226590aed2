"""The examples with other people's trainers run in either space."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "integrations"
#: Example -> what it needs, and what it prints.
EXAMPLES = {
    "accelerate_loop": ("accelerate", ["trained: 80.0% zeros", "resumed: outputs equal: True", "loaded:  .*: True"]),
    "hf_trainer": ("transformers", ["trained: 80.0% zeros", "resumed: .* True", "shipped: .* by (0e[+]00|.e-0[6-9])"]),
    "lightning_checkpoint": ("lightning", ["trained: 75.0% zeros, 100.0%", "loaded:  outputs equal: True"]),
    "timm_ema": ("timm", ["average: 80.0% zeros, (9|100)", "loaded:  outputs equal: True"]),
    "torchvision_detection": ("torchvision", ["fine-tuned: .* 70.0% zeros", "loaded: +[1-9].* equal: True"]),
    "torchvision_segmentation": (
        "torchvision", ["trained: +9", "fine-tuned: 9.* 70.0% zeros", "exported: .* by (0e[+]00|.e-0[6-9])"],
    ),
    "ultralytics_yolo": ("ultralytics", ["loaded: +70.0% zeros", "loaded: +10 .* True", "exported: .* by .e-0[2-9]"]),
}  # fmt: skip


@pytest.mark.parametrize("flag", [[], ["--interspace"]], ids=["spatial", "interspace"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str, flag: list[str], tmp_path: Path) -> None:
    """In a process of its own: these libraries change torch and settings as they are imported."""
    library, lines = EXAMPLES[name]
    pytest.importorskip(library)
    settings = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / f"{name}.py", *flag]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for line in lines:
        assert re.search(f"^{line}", run.stdout, re.MULTILINE), run.stdout[-3000:]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_is_short_and_asks_for_the_space_once(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    assert text.count("args.interspace") == 1 and len(re.findall(r"^ +interspace\(", text, re.MULTILINE)) == 1
