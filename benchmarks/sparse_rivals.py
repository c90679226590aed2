"""Sparse networks against what users would pick: ONNX Runtime, OpenVINO (fp32) and torch.

    python benchmarks/sparse_rivals.py
    python benchmarks/sparse_rivals.py --networks resnet50 googlenet --sparsities 0.9 0.98 --spaces IP SP --batch 8

Networks of torchvision at 224x224, random weights, every layer pruned alike. Each program runs in a process of its own;
they take turns, and sleep meanwhile. Printed are medians in milliseconds, and how many times faster the sparse network
is than the better of ONNX Runtime and OpenVINO: by our loops alone, and as `prepare` decides. Run it with nothing else
running.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

import ip_plugin
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import prepare
from ip_plugin.sparse.dense import _onnxruntime, _openvino

NETWORKS = (
    "resnet50", "resnet18", "vgg16_bn", "mobilenet_v2", "googlenet", "densenet121", "regnet_y_400mf", "efficientnet_b0",
)  # fmt: skip
PROGRAMS = ("loops", "prepare", "onnxruntime", "openvino", "torch")


def network(name: str, space: str, sparsity: float) -> nn.Module:
    """A pruned network."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    if space == "IP":
        ip_plugin.interspace(model, basis="orthonormal", sharing="model")
    return apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer"))


def program(kind: str, name: str, space: str, sparsity: float, batch: int) -> Callable[[], object]:
    """A call of a network by one of the programs."""
    model, images = network(name, space, sparsity), torch.randn(batch, 3, 224, 224)
    if kind in ("loops", "prepare"):
        prepared = prepare(model, images)
        if kind == "loops":
            prepared.dense = None
        return lambda: prepared(images)
    baked = ip_plugin.bake(copy.deepcopy(model)).eval()
    if kind == "torch":
        return lambda: baked(images)
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        torch.onnx.export(baked, (images,), file.name, dynamo=False)
        content = Path(file.name).read_bytes()
    way = {"onnxruntime": _onnxruntime, "openvino": _openvino}[kind](content)
    return lambda: way((images,))


def serve(arguments: argparse.Namespace) -> None:
    """In a child: for each line that comes, time some calls."""
    kind, name, space, sparsity = arguments.child
    began = time.perf_counter()
    with torch.no_grad():
        call = program(kind, name, space, float(sparsity), arguments.batch)
        print(json.dumps(time.perf_counter() - began), flush=True)
        for _ in sys.stdin:
            call()
            took = []
            for _ in range(arguments.calls):
                begin = time.perf_counter()
                call()
                took.append(1e3 * (time.perf_counter() - begin))
            print(json.dumps(statistics.median(took)), flush=True)


def compared(name: str, space: str, sparsity: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each program."""
    common = [f"--threads={arguments.threads}", f"--batch={arguments.batch}", f"--calls={arguments.calls}"]
    children = {}
    for kind in PROGRAMS:
        command = [sys.executable, __file__, *common, "--child", kind, name, space, str(sparsity)]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert child.stdout is not None
        if child.stdout.readline():  # else it is not installed
            children[kind] = child
    times: dict[str, list[float]] = {kind: [] for kind in children}
    for _ in range(arguments.rounds):
        for kind, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            times[kind].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.communicate()
    return {kind: statistics.median(values) for kind, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--spaces", nargs="+", default=["IP"], choices=["IP", "SP"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.95])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        serve(arguments)
        return
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch}; milliseconds")
    for name in arguments.networks:
        for space in arguments.spaces:
            for sparsity in arguments.sparsities:
                times = compared(name, space, sparsity, arguments)
                best = min(times.get(kind, float("inf")) for kind in ("onnxruntime", "openvino"))
                line = ", ".join(f"{kind} {milliseconds:.2f}" for kind, milliseconds in times.items())
                ratios = f"loops {best / times['loops']:.2f}, as prepared {best / times['prepare']:.2f}"
                print(f"{name}, {space}, {sparsity:.0%}: {line}; ratio: {ratios}", flush=True)


if __name__ == "__main__":
    main()
