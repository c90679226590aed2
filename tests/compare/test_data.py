"""Data of studies: every source, the splits, augmentation, and batches that depend on the seed alone."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from records import result_of
from torch import Generator, Tensor

from ip_plugin.compare import Cell, Data, Study
from ip_plugin.compare.augmentation import Augmentation
from ip_plugin.compare.cell import check_budgets
from ip_plugin.compare.data import Augmented, Images, Split, Streamed, load
from ip_plugin.errors import StudyError


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


def digest(batches: Any) -> str:
    made = hashlib.sha256()
    for images, labels in batches:
        made.update(images.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    return made.hexdigest()


def splits(images: Images) -> tuple[Split, Split]:
    assert isinstance(images.train, Split) and isinstance(images.test, Split)
    return images.train, images.test


# Sources


def test_an_archive_is_read_and_normalised(tmp_path: Path) -> None:
    made = arrays()
    loaded = load(Data(source=archive(tmp_path)))
    train, test = splits(loaded)
    assert train.images.shape == (60, 3, 32, 32) and test.images.shape == (30, 3, 32, 32) and loaded.classes == 10
    assert train.images.dtype == torch.float32 and train.labels.dtype == torch.int64
    assert train.labels.tolist() == made["train_labels"].tolist() and loaded.validation is None
    std, mean = torch.std_mean(train.images, (0, 2, 3))
    torch.testing.assert_close((std, mean), (torch.ones(3), torch.zeros(3)), atol=1e-4, rtol=0)
    # The test images by the training images' mean and deviation: here the green value of one pixel.
    green = made["train_images"][..., 1].astype(np.float64)
    expected = (made["test_images"][7, 3, 15, 1] - green.mean()) / green.std()
    assert test.images[7, 1, 3, 15].item() == pytest.approx(expected, rel=1e-4)


def test_gray_images_channels_first_and_labels_in_a_column(tmp_path: Path) -> None:
    column = (np.arange(60) % 10)[:, None].astype(np.uint8)
    gray = {f"{split}_images": arrays()[f"{split}_images"][..., 0] for split in ("train", "test")}
    train, _ = splits(load(Data(source=archive(tmp_path, **gray, train_labels=column))))
    assert train.images.shape == (60, 1, 32, 32) and train.labels.tolist() == [n % 10 for n in range(60)]
    first = {f"{split}_images": arrays()[f"{split}_images"].transpose(0, 3, 1, 2) for split in ("train", "test")}
    (tmp_path / "first").mkdir()
    (tmp_path / "last").mkdir()
    one, other = (load(Data(source=archive(tmp_path / name, **kw))) for name, kw in (("first", first), ("last", {})))
    assert torch.equal(splits(one)[0].images, splits(other)[0].images)


def cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
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


def test_torchvisions_cifar10_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").mkdir()
    theirs = splits(load(Data(source="CIFAR10", root=cifar(tmp_path / "root", monkeypatch))))
    for their, our in zip(theirs, splits(load(Data(source=archive(tmp_path)))), strict=True):
        assert torch.equal(their.images, our.images) and torch.equal(their.labels, our.labels)


def test_torchvisions_mnist_is_read_from_its_raw_files(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in (("train", 20), ("t10k", 10)):
        images = np.random.default_rng(size).integers(0, 255, (size, 28, 28), dtype=np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    train, test = splits(load(Data(source="MNIST", root=str(tmp_path))))
    assert train.images.shape == (20, 1, 28, 28) and test.labels.tolist() == list(range(10))


def folder_of_images(folder: Path, size: tuple[int, int] = (12, 10)) -> str:
    image = pytest.importorskip("PIL.Image")
    source = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = source.integers(0, 255, (*size, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return str(folder)


def test_a_folder_of_images_is_streamed_and_normalised(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    source = folder_of_images(tmp_path)
    loaded = load(Data(source=source, image_size=8))
    assert isinstance(loaded.train, Streamed) and (len(loaded.train), len(loaded.test), loaded.classes) == (12, 6, 2)
    images, labels = next(loaded.train.batches(12))
    assert images.shape == (12, 3, 8, 8) and labels.sum() == 6
    assert 0 < int(labels[:6].sum()) < 6  # not class after class: scores are computed on the first batches
    std, mean = torch.std_mean(images, (0, 2, 3))
    torch.testing.assert_close((std, mean), (torch.ones(3), torch.zeros(3)), atol=2e-3, rtol=0)
    unscaled = load(Data(source=source))
    assert next(unscaled.test.batches(6))[0].shape == (6, 3, 12, 10)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    source = folder_of_images(tmp_path)
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(StudyError, match="set image_size"):
        load(Data(source=source))


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "nothing there": (lambda f: {"source": str(f / "nothing.npz")}, "nothing at"),
    "an empty folder": (lambda f: {"source": str(f)}, "folders train and test.*an empty folder"),
    "text": (lambda f: {"source": text(f / "x.npz")}, "ValueError"),
    "a cut file": (lambda f: {"source": cut(archive(f))}, "BadZipFile"),
    "a missing array": (lambda f: {"source": archive(f, test_labels=None)}, "KeyError.*test_labels"),
    "integers": (lambda f: {"source": archive(f, train_images=np.zeros((60, 9, 9, 3), int))}, "images int64"),
    "labels too few": (lambda f: {"source": archive(f, train_labels=np.arange(9))}, r"labels int64 \(9,\)"),
    "labels that are no numbers": (lambda f: {"source": archive(f, train_labels=np.full(60, "cat"))}, "integers from"),
    "objects": (lambda f: {"source": archive(f, train_labels=np.array([None] * 60))}, "ValueError.*allow_pickle"),
    "no images": (lambda f: {"source": archive(f, **{k: v[:0] for k, v in arrays().items()})}, r"\(0, 32, 32, 3\)"),
    "one class": (
        lambda f: {"source": archive(f, train_labels=np.zeros(60, int), test_labels=np.zeros(30, int))},
        "two or more classes",
    ),
    "a wrong name": (lambda f: {"source": "CIFAR01", "root": str(f)}, "use 'CIFAR10"),
    "no root": (lambda f: {"source": "CIFAR10"}, "set root"),
    "not downloaded": (lambda f: {"source": "CIFAR10", "root": str(f)}, "nothing is downloaded.*download=True"),
    "no splits": (lambda f: {"source": "SBU", "root": str(f)}, "training and a test split"),
    "a root for digits": (lambda f: {"root": str(f)}, "leave root out"),
    "too many": (lambda f: {"source": archive(f), "train_images": 61}, "60 instead of 61"),
    "too small a split": (lambda f: {"source": archive(f), "validation": 0.01}, "change validation"),
}


def text(path: Path) -> str:
    path.write_text("images")
    return str(path)


def cut(path: str) -> str:
    Path(path).write_bytes(Path(path).read_bytes()[:-500])
    return path


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_data_is_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    make, message = BAD[name]
    with pytest.raises(StudyError, match=f"(?s){message}"):
        load(Data(**make(tmp_path)))


def test_data_are_checked_before_anything_runs() -> None:
    with pytest.raises(StudyError, match=r"nothing at 'nowhere.npz'"):
        check_budgets(Study(data={"source": "nowhere.npz"}))


# Splits


def test_a_part_of_the_training_images_is_always_the_same(tmp_path: Path) -> None:
    data = archive(tmp_path)
    (part, test), (again, _) = (splits(load(Data(source=data, train_images=20, augment=a))) for a in ((), "Grayscale"))
    assert torch.equal(part.labels, again.labels) and len(part.labels) == 20 and len(test.labels) == 30
    assert len(set(part.labels.tolist())) > 5  # not the first ones of data that may be sorted
    assert abs(part.images.mean()) < 1e-4


def test_validation_images_are_a_share_of_each_class_and_of_no_other_split(tmp_path: Path) -> None:
    numbered = arrays()["train_images"]
    numbered[:, 0, 0, 0] = np.arange(60) * 4
    source = archive(tmp_path, train_images=numbered)
    loaded = load(Data(source=source, validation=1 / 3))
    assert isinstance(loaded.validation, Split) and len(loaded.test) == 30
    assert torch.bincount(loaded.validation.labels).tolist() == [2] * 10
    parts = splits(loaded)[0], loaded.validation
    order = torch.cat([part.images[:, 0, 0, 0] for part in parts]).argsort()
    assert torch.cat([part.labels for part in parts])[order].tolist() == [n % 10 for n in range(60)]  # each once
    again = load(Data(source=source, validation=1 / 3, augment=("RandomHorizontalFlip",))).validation
    assert isinstance(again, Split) and torch.equal(again.images, loaded.validation.images)


# Augmentation


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.arange(400 * 6.0).reshape(400, 1, 2, 3)
    seen = Augmentation(("RandomHorizontalFlip",))(images, Generator().manual_seed(0))
    kept = (seen == images).all(dim=(1, 2, 3))
    flipped = (seen == images[..., [2, 1, 0]]).all(dim=(1, 2, 3))
    assert torch.equal(kept, ~flipped) and 160 < int(flipped.sum()) < 240


def test_crops_lie_anywhere_in_the_padded_images() -> None:
    images = torch.arange(1.0, 10).reshape(1, 1, 3, 3).repeat(500, 2, 1, 1)
    seen = Augmentation(("RandomCrop(3, padding=1)",))(images, Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0], [1] * 4)
    places = [padded[:, top : top + 3, left : left + 3] for top in range(3) for left in range(3)]
    counts = torch.stack([(seen == place).all(dim=(1, 2, 3)) for place in places]).sum(1)
    assert int(counts.sum()) == 500 and int(counts.min()) > 30


def test_transforms_of_torchvision_are_applied_to_each_image_by_itself_and_seeded() -> None:
    pytest.importorskip("torchvision")
    augment = Augmentation(("ColorJitter(brightness=(0.1, 0.9))", "RandomCrop(size=4, padding=1)"))
    images = torch.full((6, 3, 4, 4), 200, dtype=torch.uint8)
    state = torch.get_rng_state()
    first, again = (augment(images, Generator().manual_seed(seed)) for seed in (3, 3))
    assert torch.equal(first, again) and not torch.equal(first, augment(images, Generator().manual_seed(4)))
    assert len({int(image.max()) for image in first}) > 3 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RandomHorizontalFlp", "use 'RandomHorizontalFlip'"),
        ("RandomCrop(32, paddings=4)", "(?s)RandomCrop.*paddings"),
        ("RandomCrop(open('x'))", "arguments are numbers"),
        ("RandomCrop(32", "arguments are numbers"),
        ("a.b(1)", "arguments are numbers"),
    ],
)
def test_transforms_that_are_not_understood_are_refused(text: str, message: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(StudyError, match=message):
        load(Data(augment=(text,)))


def test_images_are_augmented_before_they_are_normalised(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    loaded = load(Data(source=archive(tmp_path), augment=("RandomInvert(p=1.0)",)))
    assert isinstance(loaded.train, Augmented)
    stored = torch.from_numpy(arrays()["train_images"]).permute(0, 3, 1, 2).float()
    std, mean = torch.std_mean(stored, (0, 2, 3), keepdim=True)
    seen, labels = next(loaded.train.shuffled(60, Generator().manual_seed(1)))
    order = torch.randperm(60, generator=Generator().manual_seed(1))
    torch.testing.assert_close(seen, (255 - stored[order] - mean) / std)
    torch.testing.assert_close(loaded.train[0][0], ((255 - stored[0]) - mean[0]) / std[0])
    assert torch.equal(labels, loaded.train.labels[order])
    torch.testing.assert_close(next(loaded.train.batches(60))[0], (stored - mean) / std)  # scores see them as they are


def test_streamed_batches_depend_on_the_generator_alone(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    augment = ("RandomHorizontalFlip", "ColorJitter(0.5)", "RandomCrop(8, padding=2)")
    source = folder_of_images(tmp_path)
    seen = {}
    for workers in (0, 2):
        loaded = load(Data(source=source, image_size=8, augment=augment), workers=workers)
        state = torch.get_rng_state()
        order = Generator().manual_seed(5)
        seen[workers] = [digest(loaded.train.shuffled(5, order)) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(workers)
    assert seen[0] == seen[2] and seen[0][0] != seen[0][1]
    plain: Tensor = next(loaded.train.batches(12))[0]
    assert torch.equal(plain, next(loaded.train.batches(12))[0])


def test_a_run_on_images_in_files_learns_and_repeats(tmp_path: Path) -> None:
    made = archive(tmp_path, **arrays(300, 100))
    study = Study(data={"source": made, "train_images": 250}, training={"epochs": 6, "batch_size": 25})
    result = result_of(Cell("ip:snip", 0.5, "interspace", 0), study)
    assert result.accuracy > 40  # chance: 10
    assert result.parameters == 282800 and result.parameters_left == 141400
