"""Tasks of studies: a data set, and a network for it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ip_plugin.errors import StudyError

from .config import Study


class Split(NamedTuple):
    """Images, float32 ``(examples, channels, height, width)``, and labels, int64 ``(examples,)``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A data set and a network for it.

    Attributes:
        title: for the report.
        read: called with the path of the data; returns (training split, test split), the images as they are stored.
        network: makes a new network, initialised from torch's random state.
        augment: called with a batch of training images and a generator.
        needs: what the path of the data must be, in words; None for a task that brings its own data.
    """

    title: str
    read: Callable[[str | None], tuple[Split, Split]]
    network: Callable[[], nn.Module]
    augment: Callable[[Tensor, Generator], Tensor] = lambda images, _: images
    needs: str | None = None

    def check(self, data: str | None) -> None:
        """Raise StudyError unless a path is given if and only if the task needs one, and exists."""
        if self.needs is None and data is not None:
            raise StudyError("The task brings its data.", f"data {data!r}", "leave data out, or choose another task")
        if self.needs is not None and (data is None or not Path(data).exists()):
            found = "no data" if data is None else f"nothing at {data!r}"
            raise StudyError("The task must have data.", found, f"give {self.needs}")

    def load(self, data: str | None, train_images: int | None = None) -> tuple[Split, Split]:
        """(training split, test split), normalised: mean 0 and variance 1 for each channel of the training images.

        Args:
            data: path of the data.
            train_images: how many training images are taken, always the same random ones; None for all.

        Raises:
            StudyError: the data cannot be read, or has fewer training images.
        """
        self.check(data)
        train, test = self.read(data)
        if train_images is not None:
            if train_images > len(train.labels):
                rule = "The data must have as many training images as `train_images` asks for."
                raise StudyError(rule, f"{len(train.labels)} instead of {train_images}", "ask for fewer")
            chosen = torch.randperm(len(train.labels), generator=Generator().manual_seed(0))[:train_images]
            train = Split(train.images[chosen], train.labels[chosen])
        # On a CPU convolutions are faster with channels last.
        layout = torch.channels_last if train.images.shape[1] > 1 else torch.contiguous_format
        images = [split.images.float().contiguous(memory_format=layout) for split in (train, test)]
        std, mean = torch.std_mean(images[0], (0, 2, 3), keepdim=True)
        for values in images:
            values.sub_(mean).div_(std)
        return Split(images[0], train.labels), Split(images[1], test.labels)


def _digits(data: str | None) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    del data
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=bunch.target)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def _cifar10(data: str | None) -> tuple[Split, Split]:
    """From an .npz file, or from the folder in which torchvision keeps the data set."""
    assert data is not None
    try:
        if Path(data).is_dir():
            from torchvision.datasets import CIFAR10

            sets = [CIFAR10(data, train=train) for train in (True, False)]
            arrays = [(dataset.data, np.asarray(dataset.targets)) for dataset in sets]
        else:
            with np.load(data, allow_pickle=False) as file:
                arrays = [(file[f"{split}_images"], file[f"{split}_labels"]) for split in ("train", "test")]
    except (ImportError, OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        reason = f"{data!r}: {type(error).__name__}: {error}"
        raise StudyError("The data must be CIFAR-10.", reason, f"give {_CIFAR10}") from error
    splits = []
    for images, labels in arrays:
        shapes = f"images {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}"
        labels = labels.reshape(-1)
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3) or not len(labels):
            raise StudyError("Images must be uint8 (N, 32, 32, 3).", shapes, f"give {_CIFAR10}")
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() > 9:
            raise StudyError("Labels must be integers from 0 to 9.", shapes, f"give {_CIFAR10}")
        splits.append(Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))))
    return splits[0], splits[1]


_CIFAR10 = (
    "the folder in which torchvision keeps CIFAR-10, or an .npz file with train_images, train_labels, test_images and "
    "test_labels"
)


def _mirrored(images: Tensor, order: Generator) -> Tensor:
    """Flip each image left to right with probability 1/2."""
    flip = torch.rand((len(images), 1, 1, 1), generator=order).to(images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def _vgg(inputs: int, *widths: int | str) -> nn.Module:
    """3x3 convolutions of these widths ("M" is max pooling), then average pooling and a linear layer."""
    modules: list[nn.Module] = []
    for width in widths:
        if isinstance(width, str):
            modules.append(nn.MaxPool2d(2))
        else:
            modules += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if inputs != width:
            self.shortcut.append(nn.Conv2d(inputs, width, 1, stride, bias=False)).append(nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(inputs: int, *widths: int) -> nn.Module:
    """A 3x3 convolution and max pooling, residual blocks of these widths, average pooling and a linear layer."""
    first = widths[0]
    stem = [nn.Conv2d(inputs, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [_Residual(*pair) for pair in zip((first, *widths), widths, strict=False)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def _of_cifar10(network: str, make: Callable[[], nn.Module]) -> Task:
    title = f"CIFAR-10: photographs, 32x32 pixels, randomly mirrored in training; a small {network}"
    return Task(title, _cifar10, make, _mirrored, _CIFAR10)


def task_of(study: Study) -> tuple[Task, str | None]:
    """The task of a study, and the path of its data.

    Raises:
        StudyError: there is no such data or network.
    """
    source, network = study.data.source, study.model.name
    if source == "digits" and network == "auto":
        return TASKS["digits"], study.data.root
    if (source == "CIFAR10" or source.endswith(".npz")) and network in ("auto", "resnet"):
        return TASKS["cifar10" if network == "auto" else "cifar10-resnet"], study.data.root or source
    raise StudyError("The data and the network must be known.", f"{source!r}, {network!r}", "use 'digits' or 'CIFAR10'")


TASKS = {
    "digits": Task(
        "scikit-learn's digits: real handwriting, 8x8 pixels, 898 images to train and 899 to test; "
        "a network of three 3x3 convolutions (32, 64, 64 channels)",
        _digits,
        lambda: _vgg(1, 32, 64, "M", 64),
    ),
    "cifar10": _of_cifar10(
        "VGG of six 3x3 convolutions (16, 32, 64, 64, 128, 128 channels), 8.7 million multiply-adds",
        lambda: _vgg(3, 16, "M", 32, "M", 64, 64, "M", 128, 128),
    ),
    "cifar10-resnet": _of_cifar10(
        "ResNet of a 3x3 convolution (32 channels) and three residual blocks (32, 64, 128 channels), 12.9 million "
        "multiply-adds",
        lambda: _resnet(3, 32, 64, 128),
    ),
}
