"""Compact files that are corrupt or inconsistent are rejected with a diagnostic; writes are atomic."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ip_plugin import errors, interspace, load, save, set_masks
from ip_plugin.adapters import torch_prune
from ip_plugin.checkpoint.container import opened, seal
from ip_plugin.checkpoint.inspection import inspect
from ip_plugin.errors import CheckpointError
from ip_plugin.utils import atomic as files


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False))


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = interspace(network(), basis="orthonormal")
    torch_prune.l1_unstructured(model[0], "weight", amount=66)
    torch_prune.l1_unstructured(model[2], "weight", amount=8)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "model"
    save(pruned(), path)
    return path.read_bytes()


def state(model: nn.Module) -> Any:
    return repr(model), [(name, id(tensor), tensor.tolist()) for name, tensor in model.named_parameters()]


def refused(path: Path, model: nn.Module | None = None) -> str:
    """The error of a file that both readers reject; the model does not change."""
    model = network() if model is None else model
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        load(model, path)
    assert state(model) == before
    return str(caught.value)


def test_every_byte_that_changes_is_noticed(tmp_path: Path) -> None:
    path, numbers, model = tmp_path / "model", random.Random(0), nn.Conv2d(1, 1, (1, 3))
    save(set_masks(interspace(nn.Conv2d(1, 1, (1, 3))), {"": torch.tensor([[[[1, 0, 1]]]])}), path)
    good = path.read_bytes()
    for place in range(len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << numbers.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError), opened(path):
            pass
        if place % 40 == 0:
            refused(path, model)


def test_every_length_but_the_whole_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model"
    for length in [*range(0, len(good), 7), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError), opened(path):
            pass
    path.write_bytes(good + b"\0")
    assert "checksum is wrong" in refused(path)
    path.write_bytes(good)
    load(network(), path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2**64 - 1))
def test_anything_else_is_no_compact_file(data: bytes, length: int) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ip_plugin_test_{os.getpid()}"
    try:
        for content in (data, length.to_bytes(8, "little") + data):
            path.write_bytes(content)
            with pytest.raises(CheckpointError), opened(path):
                pass
    finally:
        path.unlink()


def test_other_files_are_named_as_such(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other")
    assert "which `ip_plugin.save` has not written" in refused(tmp_path / "other")
    torch.save(network().state_dict(), tmp_path / "torch")
    assert "which `ip_plugin.save` has not written" in refused(tmp_path / "torch")
    with pytest.raises(FileNotFoundError):
        load(network(), tmp_path / "nothing")


# Inconsistent files with a valid checksum.

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def rewritten(good: bytes, path: Path, change: Change, sign: bool = True) -> None:
    """Rewrite a file with changed content and a valid checksum."""
    path.write_bytes(good)
    tensors = load_file(path)
    with safe_open(path, "pt") as content:
        description = json.loads(content.metadata()["ip_plugin"])
    description["crc32"] = "0" * 8
    text = change(description, tensors)
    text = text if isinstance(text, str) else json.dumps(description, separators=(",", ":"))
    save_file(tensors, path, metadata={"ip_plugin": text})
    seal(path)


def record(name: str, **changes: Any) -> Change:
    def change(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        description["tensors"][name].update(changes)

    return change


def tensor(name: str, value: Tensor | Callable[[Tensor], Tensor]) -> Change:
    def change(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = value(tensors[name]) if callable(value) and not isinstance(value, Tensor) else value

    return change


def top(**changes: Any) -> Change:
    return lambda description, tensors: description.update(changes)


def dropped(name: str) -> Change:
    return lambda description, tensors: tensors.pop(name)


def renamed(old: str, new: str) -> Change:
    def change(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        description["tensors"][new] = description["tensors"].pop(old)

    return change


def deep(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return '{"crc32":"00000000","format":1,"tensors":' + "[" * 100_000 + "]" * 100_000 + "}"


def twice(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return json.dumps(description, separators=(",", ":")).replace('"tensors":{', '"tensors":{"1.bias":{},', 1)


def longer(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Shape and values of a layer that do not fit its positions."""
    description["tensors"]["0.weight"]["shape"] = [4, 1, 3, 3]


def nan_basis(basis: Tensor) -> Tensor:
    basis[0, 0] = float("nan")
    return basis


def doubled(values: Tensor) -> Tensor:
    return torch.cat([values, values])


ZEROS = torch.zeros(0, dtype=torch.uint8)
INCONSISTENT: dict[str, tuple[Change, str]] = {
    "no JSON": (lambda d, t: '{"crc32":"00000000"', "a description that is no JSON"),
    "deep JSON": (deep, "a description that is no JSON"),
    "a list": (lambda d, t: '[{"crc32":"00000000"}]', "without a format version"),
    "a long number": (lambda d, t: '{"crc32":"00000000","format":' + "1" * 9999 + "}", "no JSON|format version"),
    "a number that is none": (lambda d, t: '{"crc32":"00000000","format":NaN}', "the number NaN"),
    "a later version": (top(format=2), "format version 2, and this version of ip_plugin reads version 1"),
    "a version that is none": (top(format="1"), "without a format version"),
    "a version that is true": (top(format=True), "without a format version"),
    "something besides": (top(code="import os"), "'code'"),
    "no tensors": (lambda d, t: d.pop("tensors") and None, "a description of"),
    "tensors that are a list": (top(tensors=[]), "of other types"),
    "groups that are none": (top(groups={"0": 0}), "'0': groups 0"),
    "groups of nothing": (top(groups={"7": 2}), "groups of '7'"),
    "groups of a norm": (top(groups={"1": 2}), "groups of '1'"),
    "a name twice": (twice, "'1.bias' twice"),
    "a field that is not known": (record("1.bias", pickled="x"), "'1.bias': a record of"),
    "a record that is a number": (lambda d, t: d["tensors"].update({"1.bias": 3}), "a record that is a int"),
    "a shape that is negative": (record("0.weight", shape=[4, -2, 3, 3]), "'0.weight': shape"),
    "a shape of floats": (record("0.weight", shape=[4.0, 2, 3, 3]), "'0.weight': shape"),
    "a shape beyond any memory": (record("0.weight", shape=[2**40, 2**40, 3, 3]), "'0.weight': shape"),
    "a shape of many dimensions": (record("0.weight", shape=[1] * 100), "'0.weight': shape"),
    "a huge shape": (record("0.weight", shape=[2**20, 2**20, 3, 3]), "in the model"),
    "a smaller shape than values": (record("0.weight", shape=[1, 1, 1, 1]), "6 values for 1 entries"),
    "a smaller shape than positions": (longer, "past the end|entries"),
    "a dtype that is none": (record("1.bias", dtype="os"), "dtype 'os'"),
    "a dtype of another size": (record("1.bias", dtype="float64"), "F32 of shape"),
    "a dtype that is not stored so": (record("0.weight", dtype="int8"), "I8|F32 of shape"),
    "rounded from nothing": (record("0.weight", stored="int8"), "stored as 'int8'"),
    "positions of another kind": (record("0.weight", positions="bits"), "a bit mask of 4 bytes for 72"),
    "positions that nobody knows": (record("0.weight", positions="gaps9"), "coded as 'gaps9'"),
    "positions of everything": (record("0.weight", positions="all"), "without a description|6 values for 72"),
    "a mask that nobody knows": (record("0.weight", mask="bits2"), "coded as 'bits2'"),
    "a mask that is not there": (record("0.weight", mask="bits"), "no tensor '0.weight/mask'"),
    "a mask of a dense tensor's positions": (record("1.weight", mask="positions"), "equal to positions that are"),
    "a masked buffer": (record("1.running_mean", mask="all"), "a buffer with"),
    "positions missing": (dropped("0.weight/positions"), "no tensor '0.weight/positions'"),
    "values missing": (dropped("0.weight/values"), "no tensor '0.weight/values'"),
    "a tensor besides": (tensor("more", torch.zeros(3)), "without a description: more"),
    "too many values": (tensor("0.weight/values", doubled), "positions of 6 entries, and 12 values"),
    "too few values": (tensor("0.weight/values", lambda v: v[:-1].clone()), "positions of 6 entries, and 5 values"),
    "values in rows": (tensor("0.weight/values", lambda v: v.reshape(2, 3)), "F32 of shape"),
    "values of another dtype": (tensor("0.weight/values", lambda v: v.double()), "F64 of shape"),
    "no positions": (tensor("0.weight/positions", ZEROS), "positions of 0 entries, and 6 values"),
    "too many positions": (tensor("0.weight/positions", doubled), "entries, and 6 values"),
    "a gap past the end": (
        tensor("0.weight/positions", torch.full((3,), 0xEE, dtype=torch.uint8)), "a position past the end",
    ),
    "a dense tensor of another shape": (tensor("1.bias", torch.zeros(5)), r"\(5,\) in the file and \(4,\)|nothing|F32"),
    "a basis with NaN": (tensor("/basis/0", nan_basis), "basis 0, which is not finite, or is singular"),
    "an infinite basis": (tensor("/basis/0", lambda b: b / 0), "not finite"),
    "a singular basis": (tensor("/basis/0", torch.ones(9, 9)), "is singular"),
    "a basis of zeros": (tensor("/basis/0", torch.zeros(9, 9)), "is singular"),
    "a basis of another size": (tensor("/basis/0", torch.eye(8)), "8 filters in the basis of kernels of 9"),
    "a basis that is oblong": (tensor("/basis/0", torch.ones(9, 8)), "basis 0: F32 of shape"),
    "a basis of integers": (tensor("/basis/0", torch.eye(9, dtype=torch.int32)), "basis 0: I32"),
    "a basis that is not there": (record("0.weight", basis=1), "basis 1 of 1"),
    "a negative basis": (record("0.weight", basis=-1), "basis -1 of 1"),
    "a basis that is true": (record("0.weight", basis=True), "basis 'True'"),
    "a basis nobody uses": (lambda d, t: d["tensors"]["0.weight"].pop("basis") and None, "bases, of which tensors use"),
    "a basis of a norm": (record("1.weight", basis=0), "something other than the weight of one convolution"),
    "a basis of a 1x1 layer": (record("2.weight", basis=0), "9 filters in the basis of kernels of 1 "),
    "trained by half": (top(bases=[{"trained": 0.5}]), "trained '0.5'"),
    "tied to nothing": (record("1.bias", tied="1.scale"), "the values of '1.scale'"),
    "tied to itself": (record("1.bias", tied="1.bias"), "the values of '1.bias'"),
    "tied and with values": (record("0.weight", tied="1.bias"), "values of its own"),
    "tied to another shape": (record("1.bias", tied="0.bias", shape=[5]), "the values of '0.bias', which differs"),
    "tied in a ring": (
        lambda d, t: (d["tensors"]["1.bias"].update(tied="0.bias"), d["tensors"]["0.bias"].update(tied="1.bias")),
        "which has none",
    ),
    "another name": (renamed("1.bias", "1.offset"), "no tensor '1.offset'"),
    "a name with a path": (renamed("1.bias", "../../etc/passwd"), "no tensor"),
    "a parameter that is a buffer": (record("1.bias", buffer=True), "a buffer in the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", INCONSISTENT)
def test_an_inconsistent_file_is_refused_with_the_name_of_the_tensor(name: str, good: bytes, tmp_path: Path) -> None:
    change, text = INCONSISTENT[name]
    rewritten(good, tmp_path / "model", change)
    message = refused(tmp_path / "model")
    assert re.search(text, message), message


def test_the_truth_told_again_is_accepted(good: bytes, tmp_path: Path) -> None:
    rewritten(good, tmp_path / "model", lambda d, t: None)
    assert load(network(), tmp_path / "model")[0].parametrizations.weight[0].mask.sum() == 6


def test_a_file_is_not_believed_what_it_would_take_memory_for(good: bytes, tmp_path: Path) -> None:
    """A file that claims a terabyte of zeros, with and without a model."""
    path = tmp_path / "model"
    rewritten(good, path, record("0.weight", shape=[2**19, 2**19, 3, 3], positions="gaps8"))
    limit = resource.getrlimit(resource.RLIMIT_AS)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 2**30, limit[1]))
    try:
        assert "of shape (524288, 524288, 3, 3) in the file and (4, 2, 3, 3) in the model" in refused(path)
        try:
            found = inspect(path)
        except CheckpointError:
            return
        assert found.lines[0].entries == 9 * 2**38
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_changes_are_refused_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random values for random fields: a CheckpointError, or a model with its original sizes."""
    folder = tmp_path_factory.mktemp("changed")
    save(pruned(), folder / "good")

    def change(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            kind = data.draw(st.sampled_from(["top", "field", "tensor", "bytes"]))
            if kind == "top":
                description[data.draw(st.sampled_from(["format", "tensors", "bases", "groups", "x"]))] = data.draw(JSON)
            elif kind == "field" and isinstance(description["tensors"], dict) and description["tensors"]:
                name = data.draw(st.sampled_from(sorted(description["tensors"])))
                fields = ["shape", "dtype", "stored", "buffer", "tied", "positions", "mask", "basis"]
                known = [
                    "",
                    "all",
                    "bits",
                    "gaps4",
                    "gaps8",
                    "positions",
                    "float32",
                    "uint8",
                    "0.weight",
                    "1.bias",
                    0,
                    1,
                ]
                value = st.sampled_from(known) | st.lists(st.integers(0, 9), max_size=4) | JSON
                if isinstance(description["tensors"][name], dict):
                    description["tensors"][name][data.draw(st.sampled_from(fields))] = data.draw(value)
            elif tensors:
                name = data.draw(st.sampled_from(sorted(tensors)))
                raw = tensors[name].reshape(-1).view(torch.uint8).clone()
                if kind == "bytes" and len(raw):
                    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
                    tensors[name] = raw.view(tensors[name].dtype).reshape(tensors[name].shape)
                elif kind == "tensor":
                    length = data.draw(st.integers(0, 40))
                    dtype = data.draw(st.sampled_from([torch.uint8, torch.float32, torch.int64]))
                    tensors[name] = torch.zeros(length, dtype=dtype)

    rewritten((folder / "good").read_bytes(), folder / "model", change)
    model = network()
    before = state(model)
    try:
        load(model, folder / "model")
    except CheckpointError:
        assert state(model) == before
    else:
        assert sum(p.numel() for p in model.parameters()) <= 200
    try:
        str(inspect(folder / "model"))
    except CheckpointError:
        pass


# Atomic writes.


def test_equal_models_make_equal_files(good: bytes, tmp_path: Path) -> None:
    save(pruned(), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == good
    assert os.listdir(tmp_path) == ["again"]


def test_safetensors_reads_what_is_dense(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(good)
    tensors = load_file(tmp_path / "model")
    assert torch.equal(tensors["1.running_var"], torch.ones(4)) and tensors["0.weight/values"].shape == (6,)


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    step: str, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").write_bytes(b"old")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        save(pruned(), tmp_path / "model")
    monkeypatch.undo()
    assert (tmp_path / "model").read_bytes() == b"old" and os.listdir(tmp_path) == ["model"]


def test_the_file_and_its_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it is renamed, the folder afterwards."""
    seen: list[str] = []
    sync, replace = os.fsync, os.replace

    def watched(descriptor: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def renaming(*names: Any) -> None:
        seen.append("renamed")
        replace(*names)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", renaming)
    save(pruned(), tmp_path / "model")
    first, second, third = seen
    assert first.startswith(f"{tmp_path}/.model.") and second == "renamed" and third == str(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Writes fail in the middle, in a process with a limited file size."""
    save(pruned(), tmp_path / "model")
    before = (tmp_path / "model").read_bytes()
    code = f"""
import resource, signal, torch
from ip_plugin import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    save(torch.nn.Linear(100, 100), {str(tmp_path / "model")!r})
except Exception as error:
    print("refused:", type(error).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("refused:"), run.stderr
    assert (tmp_path / "model").read_bytes() == before and os.listdir(tmp_path) == ["model"]


def test_killed_at_any_moment_a_whole_file_is_there(tmp_path: Path) -> None:
    """A forked process saves two models in turn until it is killed, many times."""
    path = tmp_path / "model"
    models = [nn.Linear(300, 100), nn.Linear(300, 100)]
    models[1].weight.data.zero_()
    sizes = set()
    for model in models:
        save(model, path)
        sizes.add(path.stat().st_size)
    numbers = random.Random(1)
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                for i in range(10**6):
                    save(models[i % 2], path)
            finally:
                os._exit(1)
        time.sleep(0.005 + numbers.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        loaded = load(nn.Linear(300, 100), path)
        assert any(torch.equal(loaded.weight, model.weight) for model in models)
        assert path.stat().st_size in sizes
    left = [name for name in os.listdir(tmp_path) if name != "model"]
    assert all(name.startswith((".model.", ".tmp")) for name in left), left


def test_write_whole_still_takes_text(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "text", "ä")
    assert (tmp_path / "text").read_bytes() == "ä".encode()


def test_masks_of_ones_take_no_bytes(tmp_path: Path) -> None:
    model = set_masks(nn.Linear(64, 64), {"": torch.ones(64, 64)})
    save(model, tmp_path / "ones")
    sizes = {line.name: line.nbytes for line in inspect(tmp_path / "ones").lines}
    assert sizes == {"bias": 256, "weight": 16384}


def test_names_that_would_be_one_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(64, 64, bias=False)
    set_masks(model, {"": torch.eye(64)})
    model.register_buffer("weight/values", torch.ones(2))
    with pytest.raises(errors.CheckpointError, match="two tensors of this name"):
        save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []
