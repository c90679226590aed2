"""What is kept of one cell: its result, its training curve, the density of its layers, and its learned bases."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

import ip_plugin

from .config import Cell


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training.

    Attributes:
        epoch: its number, from 1, over all trainings and fine-tunings of the cell.
        phase: whether the network was trained or, after pruning, fine-tuned.
        loss: mean loss over the training images.
        lr: learning rate of its last step.
        accuracy: on the validation images, in percent; None without any.
        seconds: since the cell began.
        train_accuracy: on the training images as they were trained with, in percent; None if it was not counted.
    """

    epoch: int
    phase: Literal["train", "finetune"]
    loss: float
    lr: float
    accuracy: float | None
    seconds: float
    train_accuracy: float | None = None


@dataclass(frozen=True)
class Result:
    """What was measured of the network of one cell.

    Attributes:
        accuracy: share of the test images classified correctly at the end, in percent.
        accuracy_before_pruning: that of the trained network before pruning; None unless it was pruned between training
            and fine-tuning.
        parameters: number of prunable parameters.
        parameters_left: non-zeros among them at the end, trained bases included where the network needs them (one
            whose channels were removed is baked).
        basis_parameters: size of the trained bases.
        spatial_layers: convolutions that stayed spatial because their budget would not pay for their basis.
        seconds: time without that of measuring latencies; short where the training was in the cache.
        macs, macs_left: multiply-adds of the convolution and linear layers for one image before pruning, and those of
            what is not pruned: in the interspace with those of the basis, and never more than the dense layer has.
        file_bytes: size of the file that `ip_plugin.save` writes.
        latency_ms, dense_latency_ms: median time of a call with one image of the network that
            `ip_plugin.sparse.prepare` makes, and of the network before pruning; None unless the study asks for it.
        validation_accuracy: as `accuracy`, on the validation images; None without any.
        lr: learning rate that the network was trained with.
    """

    accuracy: float
    accuracy_before_pruning: float | None
    parameters: int
    parameters_left: int
    basis_parameters: int
    spatial_layers: tuple[str, ...]
    seconds: float
    macs: int | None = None
    macs_left: int | None = None
    file_bytes: int | None = None
    latency_ms: float | None = None
    dense_latency_ms: float | None = None
    validation_accuracy: float | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Record:
    """What is kept of a cell that has ended.

    Attributes:
        cell: which cell.
        result: None if it failed.
        traceback: why it failed.
        curve: its epochs.
        density: share of the entries that are kept, by layer.
        bases: the filters of each learned basis, K*K x K*K, by the name of the first layer that has it.
        files: contents of the files that are kept besides, by name; they are not part of the JSON file.
    """

    cell: Cell
    result: Result | None = None
    traceback: str | None = None
    curve: tuple[Epoch, ...] = ()
    density: dict[str, float] = field(default_factory=dict)
    bases: dict[str, list[list[float]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def status(self) -> Literal["done", "failed"]:
        """Whether there is a result."""
        return "failed" if self.result is None else "done"

    def to_json(self) -> dict[str, Any]:
        """The record without its files as plain values; the inverse of `from_json`."""
        head = {"cell": self.cell._asdict(), "status": self.status}
        rest: dict[str, Any] = _adapter().dump_python(self, mode="json", exclude={"cell", "files"})
        return head | rest

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Record:
        """The record of plain values.

        Raises:
            ValueError: they are not those of a record.
        """
        return _adapter().validate_python(values)


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    return {"ip-plugin": ip_plugin.__version__, "torch": torch.__version__}


def machine() -> str:
    """What this machine is, for a reader of the results."""
    cores = f"{os.cpu_count()} cores"
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    parts = (platform.system(), platform.processor() or platform.machine(), cores, *dict.fromkeys(gpus))
    return f"{', '.join(parts)}; Python {platform.python_version()}"


@cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)
