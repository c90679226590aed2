"""Does everything work on every network? Each step on each, as a row of a table.

    python benchmarks/sweep.py sweep.csv              # torchvision's networks and 60 of timm
    python benchmarks/sweep.py sweep.csv 'timm/vit*' 'torchvision/resnet18'
    python benchmarks/sweep.py sweep.csv --steps convert prune prepare

Weights are random, images as small as the network allows, layers pruned to 90 %. The steps: convert, prune, load the
state dict into a fresh converted model (strict), save and load a compact file, bake, report, prepare, report what was
prepared. Entries: "ok", "ok: remark", "refused: reason" (an error of this package), "DIFFERENT: outputs or counts",
"FAILED: error". Each network runs in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import csv
import fnmatch
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ip_plugin
from ip_plugin.errors import InterspaceError, SparseFallbackWarning
from ip_plugin.methods import apply_masks, magnitude, select

TIMM = """
    test_resnet resnet18 resnet26d resnetv2_50x1_bit resnext26ts seresnet18 skresnet18 res2net50d resnest14d
    regnetx_002 regnety_002 regnetz_005 efficientnet_b0 tf_efficientnet_b0 mixnet_s mobilenetv2_050
    tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small lcnet_050 fbnetc_100 ghostnetv2_100 convnextv2_atto
    edgenext_xx_small hrnet_w18_small dla34 densenet121 inception_v4 selecsls42 cspresnet50 vovnet39a
    vit_tiny_patch16_224 vit_small_patch14_dinov2 vit_tiny_r_s16_p8_224 deit_tiny_distilled_patch16_224
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 xcit_nano_12_p16_224 levit_128s mobilevit_xxs
    mobilevitv2_050 pit_ti_224 poolformer_s12 mixer_s32_224 gmlp_ti16_224 volo_d1_224 pvt_v2_b0
    twins_pcpvt_small convit_tiny eva02_tiny_patch14_224 coatnet_nano_rw_224 efficientformerv2_s0
    efficientvit_b0 fastvit_t8 repvit_m0_9 mobileone_s0 caformer_s18 nfnet_l0 halonet26t rexnet_100 hgnetv2_b0
""".split()  # noqa: SIM905
STEPS = ("convert", "prune", "fresh load", "save and load", "bake", "report", "prepare", "report prepared")
SPARSITY, TOLERANCE = 0.9, 1e-3


def names() -> list[str]:
    """All networks; those of timm if it is installed."""
    import torchvision

    vision = [f"torchvision/{name}" for name in torchvision.models.list_models() if not name.startswith("raft")]
    try:
        import timm  # noqa: F401
    except ImportError:
        return vision
    return vision + [f"timm/{name}" for name in TIMM]


def build(name: str) -> nn.Module:
    """A network with random weights, the same at every call."""
    torch.manual_seed(0)
    library, _, network = name.partition("/")
    model: nn.Module
    if library == "timm":
        import timm

        model = timm.create_model(network)
    else:
        import torchvision

        weights = {"weights": None}
        if network.startswith(
            ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn", "lraspp")
        ):
            weights["weights_backbone"] = None
        model = torchvision.models.get_model(network, **weights)
    return model.eval()


def example(name: str, model: nn.Module) -> Any:
    """The smallest input that a network runs on, of those tried."""
    generator = torch.Generator().manual_seed(1)
    video = name.startswith("torchvision/") and name.split("/")[1].startswith(
        ("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")
    )
    detector = hasattr(model, "roi_heads") or hasattr(model, "anchor_generator")
    error: Exception | None = None
    for size in (64, 128, 224, 256, 299, 518):
        shape = (3, 16, size, size) if video else (3, size, size)
        image = torch.rand(shape, generator=generator)
        inputs = [image] if detector else image[None]
        try:
            outputs(model, inputs)
        except Exception as failure:
            error = failure
        else:
            return inputs
    raise RuntimeError(f"no input found for {name}") from error


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Any]:
    """The leaves of a network's outputs."""
    torch.manual_seed(2)
    return tree_leaves(model(inputs))


def compared(actual: list[Any], expected: list[Any], tolerance: float = TOLERANCE) -> str:
    """Either "ok" or what is different."""
    if len(actual) != len(expected):
        return f"DIFFERENT: {len(actual)} outputs instead of {len(expected)}"
    largest = 0.0
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, Tensor):
            if one.shape != other.shape:
                return f"DIFFERENT: shape {tuple(one.shape)} instead of {tuple(other.shape)}"
            if other.numel():
                scale = float(other.float().abs().max()) + 1e-6
                largest = max(largest, float((one.float() - other.float()).abs().max()) / scale)
    return "ok" if largest <= tolerance else f"DIFFERENT: outputs by {largest:.1e}"


class Sweep:
    """The steps for one network.

    Args:
        name: of the network.
        space: "interspace" or "spatial".
        limit: number of parameters of larger networks, which are skipped.
        steps: in this order; those behind "prune" need it, and "report prepared" those before it.
    """

    def __init__(self, name: str, space: str, limit: float, steps: Sequence[str] = STEPS) -> None:
        self.name, self.space, self.row = name, space, {"network": name}
        self.model = build(name)
        size = sum(parameter.numel() for parameter in self.model.parameters())
        if size > limit:
            self.row["convert"] = f"skipped: {size:,} parameters"
            return
        self.inputs = example(name, self.model)
        self.plain = outputs(self.model, self.inputs)
        for step in steps:
            self.row[step] = self.status(getattr(self, step.replace(" ", "_")))

    def status(self, step: Callable[[], str]) -> str:
        """What a step comes to."""
        try:
            return step()
        except InterspaceError as error:
            return "refused: " + " ".join(str(error).split())[:300]
        except Exception as error:
            return f"FAILED: {type(error).__name__}: " + " ".join(str(error).split())[:300]

    def converted(self) -> nn.Module:
        """A fresh network in the space."""
        model = build(self.name)
        return (
            ip_plugin.interspace(model, basis="orthonormal", sharing="model") if self.space == "interspace" else model
        )

    def convert(self) -> str:
        """Move the network to the space: the same outputs."""
        self.model = self.converted()
        return compared(outputs(self.model, self.inputs), self.plain)

    def prune(self) -> str:
        """Prune every layer to the same sparsity."""
        apply_masks(self.model, select(magnitude(self.model), sparsity=SPARSITY, scope="layer"))
        self.pruned = outputs(self.model, self.inputs)
        sparsity = ip_plugin.report(self.model).prunable.sparsity
        return "ok" if abs(sparsity - SPARSITY) < 0.01 else f"DIFFERENT: sparsity {sparsity:.3f}"

    def fresh_load(self) -> str:
        """Load the state dict into a fresh network in the space: equal outputs."""
        fresh = self.converted()
        fresh.load_state_dict(self.model.state_dict(), strict=True)
        return compared(outputs(fresh, self.inputs), self.pruned, 0)

    def save_and_load(self) -> str:
        """Load a compact file into a fresh plain network: equal outputs."""
        with tempfile.TemporaryDirectory() as folder:
            ip_plugin.save(self.model, Path(folder) / "model.ip")
            loaded = ip_plugin.load(build(self.name), Path(folder) / "model.ip")
        return compared(outputs(loaded, self.inputs), self.pruned, 0)

    def bake(self) -> str:
        """Bake a copy: the same outputs."""
        return compared(outputs(ip_plugin.bake(copy.deepcopy(self.model)), self.inputs), self.pruned)

    def report(self) -> str:
        """Measure: all parameters are counted."""
        self.measured = ip_plugin.report(self.model, self.inputs)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if parameters != self.measured.everything.parameters:
            return f"DIFFERENT: {self.measured.everything.parameters:,} parameters instead of {parameters:,}"
        unused = [row.layer for row in self.measured.rows if not row.macs_dense]
        remarks = f"prunable {self.measured.coverage:.0%}" if self.measured.coverage < 0.95 else ""
        remarks += f" without multiply-adds: {', '.join(unused[:3])} ({len(unused)})" if unused else ""
        return f"ok: {remarks.strip()}" if remarks else "ok"

    def prepare(self) -> str:
        """Prepare for sparse inference: the same outputs."""
        from ip_plugin.sparse import prepare

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.prepared = prepare(self.model, self.inputs, deterministic=True)
        status = compared(outputs(self.prepared, self.inputs), self.pruned, 1e-4)
        remarks = [
            str(w.message).split("Found: ")[1].split(" What to do")[0]
            for w in caught
            if w.category is SparseFallbackWarning
        ]
        return f"{status}: {' '.join(remarks[0].split())[:300]}" if remarks else status

    def report_prepared(self) -> str:
        """Measure what was prepared: the model's own counts."""
        actual, expected = ip_plugin.report(self.prepared, self.inputs), self.measured
        for one, other in zip((*actual.rows, actual.everything), (*expected.rows, expected.everything), strict=True):
            for count in (
                "layer",
                "space",
                "parameters",
                "nonzeros",
                "basis",
                "macs_dense",
                "macs_nonzero",
                "macs_basis",
            ):
                if getattr(one, count) != getattr(other, count):
                    return f"DIFFERENT: {one.layer} {count} {getattr(one, count)} instead of {getattr(other, count)}"
        return "ok: " + ", ".join(f"{count} {how}" for how, count in Counter(row.runs for row in actual.rows).items())


def row_of(name: str, *options: str) -> dict[str, str]:
    """The row of one network, from a process of its own."""
    command = [sys.executable, __file__, "-", name, "--one", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"network": name, STEPS[0]: "FAILED: half an hour is over"}
    except (IndexError, ValueError):
        lines = done.stderr.splitlines() or [""]
        return {"network": name, STEPS[0]: f"FAILED: exit status {done.returncode}: {lines[-1]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="CSV file to write")
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of networks, with wildcards")
    parser.add_argument("--space", choices=["interspace", "spatial"], default="interspace")
    parser.add_argument("--limit", default="1.5e8", help="number of parameters of larger networks, which are skipped")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="all steps by default")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.one:
        print(json.dumps(Sweep(options.patterns[0], options.space, float(options.limit), options.steps).row))
        return
    chosen = [name for name in names() if any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns)]

    def run(name: str) -> dict[str, str]:
        return row_of(name, "--space", options.space, "--limit", options.limit, "--steps", *options.steps)

    summary: dict[str, Counter[str]] = {step: Counter() for step in STEPS}
    with open(options.table, "w", newline="") as file, ThreadPoolExecutor(options.jobs) as pool:
        writer = csv.DictWriter(file, ["network", *STEPS], restval="")
        writer.writeheader()
        for row in pool.map(run, chosen):
            writer.writerow(row)
            file.flush()
            print(
                row["network"], *(f"{s}: {row[s]}" for s in STEPS if not row.get(s, "ok").startswith("ok")), sep="\n  "
            )
            for step in options.steps:
                summary[step][row.get(step, "not run").partition(":")[0]] += 1
    for step in options.steps:
        print(f"{step}: " + ", ".join(f"{count} {status}" for status, count in summary[step].items()))


if __name__ == "__main__":
    main()
