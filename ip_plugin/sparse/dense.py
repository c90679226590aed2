"""The fastest dense way to run a whole network, where that is faster than the sparse one."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..utils.timing import side_by_side
from .graph import Outputs, Structure, outputs_of

#: A network that is so many times as fast as torch's is not compared with others, which take half of torch's time.
_FAR_AHEAD = 3.0
#: A dense way is taken if it takes less than this share of the sparse network's time.
_CLEARLY = 0.9
_ROUNDS = 7

Way = Callable[[tuple[Tensor, ...]], list[Any]]


class Dense(NamedTuple):
    """A dense way to run a network on inputs of one shape.

    Attributes:
        name: who runs it: torch, onnxruntime or openvino.
        run: returns the leaves of the outputs.
        shapes: of the inputs.
        milliseconds, sparse_milliseconds: medians, of calls that took turns.
    """

    name: str
    run: Way
    shapes: tuple[torch.Size, ...]
    milliseconds: float
    sparse_milliseconds: float

    def __str__(self) -> str:
        return (
            f"run dense by {self.name}, since that takes {self.milliseconds:.2f} ms and the sparse network "
            f"{self.sparse_milliseconds:.2f} ms"
        )


def faster_dense(
    sparse: nn.Module, plain: nn.Module, structure: Structure, tensors: tuple[Tensor, ...], tolerance: float,
    others: bool = True,
) -> Dense | None:  # fmt: skip
    """The fastest dense way; None if the sparse network is faster, or as fast.

    Args:
        sparse, plain: the network and a baked model, to be called by `structure`.
        structure, tensors: of a call.
        tolerance: how much outputs may differ, relative to the largest.
        others: try ONNX Runtime and OpenVINO, too, where they are installed.
    """
    expected = outputs_of(plain, structure, tensors)

    def by_torch(values: tuple[Tensor, ...]) -> list[Any]:
        return tree_flatten(structure.call(plain, values))[0]

    def compared(name: str, way: Way, rounds: int = _ROUNDS, untimed: int = 4) -> Dense:
        calls = {"sparse": lambda: structure.call(sparse, tensors), name: lambda: way(tensors)}
        with torch.no_grad():
            took = side_by_side(calls, rounds=rounds, warmup=1, untimed=untimed)
        times = {who: 1e3 * median(seconds) for who, seconds in took.items()}
        return Dense(name, way, tuple(value.shape for value in tensors), times[name], times["sparse"])

    glance = compared("torch", by_torch, rounds=2, untimed=1)
    if glance.milliseconds > _FAR_AHEAD * glance.sparse_milliseconds:
        return None
    ways = [compared("torch", by_torch)]
    images = all(isinstance(leaf, Tensor) for leaf in expected.leaves) and len(structure.leaves) == len(tensors)
    if others and images:
        for name, way in _others(plain, tensors):
            with suppress(Exception):  # whatever another program does not like
                made = Outputs(way(tensors), expected.tree)
                if not expected.difference(made, tolerance):
                    ways.append(compared(name, way))
    best = min(ways, key=lambda way: way.milliseconds / way.sparse_milliseconds)
    return best if best.milliseconds < _CLEARLY * best.sparse_milliseconds else None


def _others(plain: nn.Module, tensors: tuple[Tensor, ...]) -> Iterator[tuple[str, Way]]:
    """Ways by other programs that are installed and can read the model."""
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.onnx.export(plain, tensors, file, dynamo=False)  # type: ignore[arg-type]
    except Exception:  # an operator that it does not know
        return
    for name, load in (("onnxruntime", by_onnxruntime), ("openvino", by_openvino)):
        with suppress(Exception):
            yield name, load(file.getvalue())


def by_onnxruntime(model: bytes, spinning: bool = False) -> Way:
    """A way to run an ONNX model; with `spinning` threads it is faster, and slows down others of the same process."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(tensors: tuple[Tensor, ...]) -> list[Any]:
        arrays = (tensor.detach().contiguous().numpy() for tensor in tensors)
        return [torch.from_numpy(made) for made in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def by_openvino(model: bytes, precision: str = "f32") -> Way:
    """A way to run an ONNX model, in OpenVINO's name of a precision."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(openvino.Core().read_model(model, b""), "CPU", options)
    request, lock = compiled.create_infer_request(), threading.Lock()

    def run(tensors: tuple[Tensor, ...]) -> list[Any]:
        arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
        with lock:
            made = request.infer(dict(enumerate(arrays)))
            return [torch.from_numpy(made[number].copy()) for number in range(len(compiled.outputs))]

    return run
