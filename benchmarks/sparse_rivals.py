"""Sparse networks against what users would pick: ONNX Runtime, OpenVINO (fp32, and int8 beside it), MNN and torch.

    python benchmarks/sparse_rivals.py
    python benchmarks/sparse_rivals.py --networks resnet50 resnet18 --spaces IP SP --batch 8
    python benchmarks/sparse_rivals.py --preparations 10 --networks resnet50 --sparsities 0.95

Networks of torchvision at 224x224, random weights, every layer pruned alike. Each program runs in a process of its own;
all of one network take turns, and sleep meanwhile. Printed are medians in milliseconds, and how many times faster the
sparse network is than the better of ONNX Runtime and OpenVINO in fp32: by our loops alone, and as `prepare` decides.
MNN, which skips zeros, runs the spatially pruned ones. With `--preparations`, so many processes prepare the same
network, every other one beside a busy process; the differences of their times are printed. Run it with nothing else
running, and throw away a run in which the dense baseline moved by more than 10 %. The others are installed by
`pip install onnx onnxruntime openvino mnn`; what is missing is left out.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import ip_plugin
from ip_plugin.methods import apply_masks, magnitude, select
from ip_plugin.sparse import SparseNetwork, prepare
from ip_plugin.sparse.dense import by_onnxruntime, by_openvino

NETWORKS = (
    "resnet50", "resnet18", "vgg16_bn", "mobilenet_v2", "googlenet", "densenet121", "regnet_y_400mf", "efficientnet_b0",
)  # fmt: skip
RIVALS = ("onnxruntime", "openvino")
DENSE = (*RIVALS, "openvino int8", "torch")

Call = Callable[[], object]


def network(name: str, space: str, sparsity: float) -> nn.Module:
    """A pruned network."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    if space == "IP":
        ip_plugin.interspace(model, basis="orthonormal", sharing="model")
    return apply_masks(model, select(magnitude(model), sparsity=sparsity, scope="layer"))


def program(kind: str, model: nn.Module, images: Tensor) -> tuple[Call, str | None]:
    """A call of a network by one of the programs, and the name of the one that `prepare` runs it by instead."""
    if kind in ("loops", "prepare"):
        prepared = prepare(model, images)
        assert isinstance(prepared, SparseNetwork)
        if kind == "loops":
            prepared.dense = None
        return lambda: prepared(images), None if prepared.dense is None else prepared.dense.name
    baked = ip_plugin.bake(copy.deepcopy(model)).eval()
    if kind == "torch":
        return lambda: baked(images), None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(baked, (images,), str(file), input_names=["images"], dynamo=False)
        if kind == "mnn":
            return by_mnn(file, images), None
        if kind == "onnxruntime":
            way = by_onnxruntime(file.read_bytes(), spinning=True)
        elif kind == "openvino":
            way = by_openvino(file.read_bytes())
        else:
            way = by_openvino(quantized(file, images), "undefined")
    return lambda: way((images,)), None


def quantized(file: Path, images: Tensor) -> bytes:
    """An ONNX model in int8, with ranges of one batch."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Batch(CalibrationDataReader):  # type: ignore[misc]  # without types
        batches = iter([{"images": images.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    made = file.with_name("int8.onnx")
    quantize_static(file, made, Batch(), per_channel=True, activation_type=QuantType.QInt8)
    return made.read_bytes()


def by_mnn(file: Path, images: Tensor) -> Call:
    """A call by MNN, which detects what is sparse enough."""
    from MNN import expr, nn

    made, converter = file.with_name("model.mnn"), Path(sys.executable).with_name("mnnconvert")
    convert = [converter, "-f", "ONNX", "--modelFile", file, "--MNNModel", made, "--bizCode", "x"]
    subprocess.run([*map(str, convert), "--detectSparseSpeedUp"], check=True, capture_output=True)
    options = {"backend": "CPU", "precision": "high", "numThread": torch.get_num_threads()}
    loaded = nn.load_module_from_file(str(made), [], [], runtime_manager=nn.create_runtime_manager((options,)))
    values = expr.placeholder(list(images.shape), expr.NCHW)

    def call() -> object:
        values.write(images.numpy())
        return loaded.forward([values])[0].read()

    return call


def serve(arguments: argparse.Namespace) -> None:
    """In a child: get a program ready, and say so; then, for each line that comes, time some calls."""
    kind, name, space, sparsity = arguments.child
    model, images = network(name, space, float(sparsity)), torch.randn(arguments.batch, 3, 224, 224)
    began = time.perf_counter()
    with torch.no_grad():
        call, instead = program(kind, model, images)
        print(json.dumps((time.perf_counter() - began, instead)), flush=True)
        for _ in sys.stdin:
            call()
            took = []
            for _ in range(arguments.calls):
                begin = time.perf_counter()
                call()
                took.append(1e3 * (time.perf_counter() - begin))
            print(json.dumps(statistics.median(took)), flush=True)


class Child:
    """A process that runs one program.

    Attributes:
        seconds: that the program took to get ready; None if it is not installed.
        instead: how `prepare` decided to run the network, if not by our loops.
        times: milliseconds of each turn.
    """

    def __init__(self, arguments: argparse.Namespace, kind: str, name: str, space: str, sparsity: float) -> None:
        options = [f"--threads={arguments.threads}", f"--batch={arguments.batch}", f"--calls={arguments.calls}"]
        command = [sys.executable, __file__, *options, "--child", kind, name, space, str(sparsity)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.times: list[float] = []
        self.seconds: float | None = None
        self.instead: str | None = None

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line[0] in "[0123456789":  # other programs may print, too
                return json.loads(line)
        return None

    def wait(self) -> bool:
        """Until the program is ready; False if it is not installed."""
        if (ready := self._answer()) is None:
            return False
        self.seconds, self.instead = ready
        return True

    def turn(self) -> None:
        """Time some calls."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.times.append(self._answer())

    @property
    def milliseconds(self) -> float:
        """The median of all turns."""
        return statistics.median(self.times)

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()


def take_turns(children: list[Child], rounds: int) -> None:
    """Time all of them in turn; threads of one that spin on have stopped when the next one begins."""
    for _ in range(rounds):
        for child in children:
            child.turn()
            time.sleep(0.1)


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Print the times of a network by all programs."""
    cells = [(space, sparsity) for space in arguments.spaces for sparsity in arguments.sparsities]
    children: dict[tuple[str, str, float], Child] = {}
    with ExitStack() as stack:

        def start(kind: str, space: str, sparsity: float) -> Child:
            child = children[kind, space, sparsity] = Child(arguments, kind, name, space, sparsity)
            stack.callback(child.close)
            return child

        for cell in cells:  # one after the other, since they time their steps
            ours = start("prepare", *cell)
            if ours.wait() and ours.instead:
                start("loops", *cell).wait()
        others = [(kind, *cells[0]) for kind in DENSE] + [("mnn", *cell) for cell in cells if cell[0] == "SP"]
        for other in others:
            start(*other)
        for other in others:
            if not children[other].wait():
                del children[other]
        take_turns(list(children.values()), arguments.rounds)
    found = {kind: child for (kind, *_), child in children.items() if kind in DENSE}
    rival = min((found[kind] for kind in RIVALS if kind in found), key=lambda child: child.milliseconds)
    half = arguments.rounds // 2
    moved = statistics.median(rival.times[half:]) / statistics.median(rival.times[: half + 1]) - 1
    line = ", ".join(f"{kind} {child.milliseconds:.2f}" for kind, child in found.items())
    print(f"{name}, dense: {line}; the baseline moved by {moved:+.1%}", flush=True)
    for (kind, space, sparsity), child in children.items():
        if kind != "prepare":
            continue
        loops = children.get(("loops", space, sparsity), child)
        times = rival.milliseconds / loops.milliseconds
        line = f"{name}, {space}, {sparsity:.0%}: {loops.milliseconds:.2f}, {times:.2f} times"
        if loops is not child:
            times = rival.milliseconds / child.milliseconds
            line += f"; as prepared (by {child.instead}) {child.milliseconds:.2f}, {times:.2f} times"
        if mnn := children.get(("mnn", space, sparsity)):
            line += f"; mnn {mnn.milliseconds:.2f}, {mnn.milliseconds / loops.milliseconds:.2f} times"
        print(f"{line}; ready in {child.seconds:.1f} s", flush=True)


def prepare_often(name: str, arguments: argparse.Namespace) -> None:
    """Print the times of a network that several processes have prepared."""
    space, sparsity, children = arguments.spaces[0], arguments.sparsities[0], []
    for number in range(arguments.preparations):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number % 2)]
        children.append(Child(arguments, "prepare", name, space, sparsity))
        children[-1].wait()
        for process in busy:
            process.kill()
    take_turns(children, arguments.rounds)
    times = [child.milliseconds for child in children]
    for child in children:
        child.close()
    print(f"{name}, {space}, {sparsity:.0%}, prepared {len(times)} times, every other time beside a busy process:")
    print(", ".join(f"{milliseconds:.2f}" for milliseconds in times), end="; ")
    print(f"largest over smallest {max(times) / min(times):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--spaces", nargs="+", default=["IP"], choices=["IP", "SP"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--preparations", type=int, default=0)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        serve(arguments)
        return
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch}; milliseconds", flush=True)
    for name in arguments.networks:
        (prepare_often if arguments.preparations else compare)(name, arguments)


if __name__ == "__main__":
    main()
