"""Data and networks of studies."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from records import result_of
from torch import Generator, nn

from ip_plugin import report
from ip_plugin.compare.cell import check_budgets
from ip_plugin.compare.config import Cell, Study
from ip_plugin.compare.tasks import TASKS
from ip_plugin.errors import StudyError

CIFAR10 = TASKS["cifar10"]


def arrays(train: int = 60, test: int = 30) -> dict[str, Any]:
    """Images whose brightness in one corner tells the label."""
    made: dict[str, Any] = {}
    source = np.random.default_rng(0)
    for split, size in (("train", train), ("test", test)):
        labels = np.arange(size) % 10
        images = source.integers(0, 40, (size, 32, 32, 3), dtype=np.uint8)
        images[:, :8, 12:20, 1] += (labels * 20).astype(np.uint8)[:, None, None]
        made |= {f"{split}_images": images, f"{split}_labels": labels}
    return made


def archive(folder: Path, **changed: Any) -> str:
    path = folder / "data.npz"
    np.savez(path, **{name: value for name, value in (arrays() | changed).items() if value is not None})
    return str(path)


def test_an_archive_is_read_and_normalised(tmp_path: Path) -> None:
    made = arrays()
    train, test = CIFAR10.load(archive(tmp_path))
    assert train.images.shape == (60, 3, 32, 32) and test.images.shape == (30, 3, 32, 32)
    assert train.images.dtype == torch.float32 and train.labels.dtype == torch.int64
    assert train.labels.tolist() == made["train_labels"].tolist()
    std, mean = torch.std_mean(train.images, (0, 2, 3))
    torch.testing.assert_close((std, mean), (torch.ones(3), torch.zeros(3)), atol=1e-4, rtol=0)
    # The test images by the training images' mean and deviation: here the green value of one pixel.
    green = made["train_images"][..., 1].astype(np.float64)
    expected = (made["test_images"][7, 3, 15, 1] - green.mean()) / green.std()
    assert test.images[7, 1, 3, 15].item() == pytest.approx(expected, rel=1e-4)


def test_labels_may_be_a_column(tmp_path: Path) -> None:
    train, _ = CIFAR10.load(archive(tmp_path, train_labels=(np.arange(60) % 10)[:, None].astype(np.uint8)))
    assert train.labels.tolist() == [n % 10 for n in range(60)]


def test_a_part_of_the_training_images_is_always_the_same_and_no_part_of_the_test(tmp_path: Path) -> None:
    data = archive(tmp_path)
    part, test = CIFAR10.load(data, 20)
    again, _ = CIFAR10.load(data, 20)
    assert torch.equal(part.images, again.images) and len(part.labels) == 20 and len(test.labels) == 30
    assert len(set(part.labels.tolist())) > 5  # not the first ones of data that may be sorted
    assert abs(part.images.mean()) < 1e-4


def torchvisions_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The layout of torchvision's CIFAR10, made small, with the hashes that it checks."""
    torchvision = pytest.importorskip("torchvision")
    kind, made = torchvision.datasets.CIFAR10, arrays()
    base = folder / kind.base_folder
    base.mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    lists = {
        split: [
            write(
                f"{split}_batch",
                {"data": made[f"{split}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072), "labels": [*labels]},
            )
        ]
        for split, labels in (("train", made["train_labels"].tolist()), ("test", made["test_labels"].tolist()))
    }
    monkeypatch.setattr(kind, "train_list", lists["train"])
    monkeypatch.setattr(kind, "test_list", lists["test"])
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return str(folder)


def test_torchvisions_folder_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    folder = torchvisions_folder(tmp_path / "folder", monkeypatch)
    for theirs, ours in zip(CIFAR10.load(folder), CIFAR10.load(archive(tmp_path)), strict=True):
        assert torch.equal(theirs.images, ours.images) and torch.equal(theirs.labels, ours.labels)


BAD: dict[str, tuple[Callable[[Path], str | None], str]] = {
    "none": (lambda _: None, "no data"),
    "nothing there": (lambda f: str(f / "nothing.npz"), "nothing at"),
    "an empty folder": (lambda f: str(f), "RuntimeError: Dataset not found"),
    "text": (lambda f: text(f / "x.npz"), "ValueError"),
    "a cut file": (lambda f: cut(archive(f)), "BadZipFile"),
    "a missing array": (lambda f: archive(f, test_labels=None), "KeyError.*test_labels"),
    "floats": (lambda f: archive(f, train_images=np.zeros((60, 32, 32, 3))), "images float64"),
    "28 pixels": (lambda f: archive(f, train_images=np.zeros((60, 28, 28, 3), np.uint8)), r"60, 28, 28, 3"),
    "labels too few": (lambda f: archive(f, train_labels=np.arange(9)), r"labels int64 \(9,\)"),
    "labels too large": (lambda f: archive(f, train_labels=np.arange(60)), "integers from 0 to 9"),
    "labels that are no numbers": (lambda f: archive(f, train_labels=np.full(60, "cat")), "integers from 0 to 9"),
    "objects": (lambda f: archive(f, train_labels=np.array([None] * 60)), "ValueError.*allow_pickle"),
    "no images": (lambda f: archive(f, **{k: v[:0] for k, v in arrays().items()}), r"\(0, 32, 32, 3\)"),
}


def text(path: Path) -> str:
    path.write_text("images")
    return str(path)


def cut(path: str) -> str:
    Path(path).write_bytes(Path(path).read_bytes()[:-500])
    return path


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_cifar10_is_refused(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    data = make(tmp_path)
    with pytest.raises(StudyError, match=f"(?s){message}.*train_labels"):
        CIFAR10.load(data)


def test_data_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="nothing at 'nowhere.npz'"):
        check_budgets(Study(data={"source": "nowhere.npz"}))
    with pytest.raises(StudyError, match="60 instead of 61"):
        CIFAR10.load(archive(tmp_path), 61)


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.arange(400 * 6.0).reshape(400, 1, 2, 3)
    seen = CIFAR10.augment(images, Generator().manual_seed(0))
    kept = (seen == images).all(dim=(1, 2, 3))
    flipped = (seen == images[..., [2, 1, 0]]).all(dim=(1, 2, 3))
    assert torch.equal(kept, ~flipped) and 160 < int(flipped.sum()) < 240
    assert TASKS["digits"].augment(images, Generator()) is images


def test_the_networks() -> None:
    torch.manual_seed(0)
    network = report(CIFAR10.network(), torch.zeros(1, 3, 32, 32))
    assert network.prunable.parameters == 282800 and network.prunable.macs_dense == 8_701_184
    network = report(TASKS["cifar10-resnet"].network(), torch.zeros(1, 3, 32, 32))
    # 3x3: 3 to 32; 32 to 32, twice; 32 to 64 to 64; 64 to 128 to 128; two 1x1 shortcuts; a linear layer.
    assert network.prunable.parameters == 9 * (96 + 2 * 1024 + 2048 + 4096 + 8192 + 16384) + 2048 + 8192 + 1280
    assert network.prunable.macs_dense == 12_944_640
    convolutions = [m for m in TASKS["digits"].network().modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [32, 64, 64]


def test_the_residual_network_adds_what_its_blocks_compute() -> None:
    torch.manual_seed(0)
    network: Any = TASKS["cifar10-resnet"].network().eval()
    stem, blocks = network[:4], network[4:7]
    x = stem(torch.randn(2, 3, 32, 32))
    assert x.shape == (2, 32, 16, 16)
    assert torch.equal(blocks[0](x), torch.relu(blocks[0].body(x) + x))  # an identity
    shapes = [tuple((x := block(x)).shape) for block in blocks]
    assert shapes == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]


def test_a_run_on_cifar10_learns(tmp_path: Path) -> None:
    made = archive(tmp_path, **arrays(300, 100))
    settings = Study(data={"source": made, "train_images": 250}, training={"epochs": 6, "batch_size": 25})
    result = result_of(Cell("ip:snip", 0.5, "interspace", 0), settings)
    assert result.accuracy > 40  # chance: 10
    assert result.parameters == 282800 and result.parameters_left == 141400
    other = result_of(Cell("ip:snip", 0.5, "interspace", 0), settings.changed({"data.train_images": 200}))
    assert other.accuracy != result.accuracy
