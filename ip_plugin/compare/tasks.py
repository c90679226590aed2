"""What networks are compared on: data, and a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Split(NamedTuple):
    """Images, float32 ``(examples, channels, height, width)``, and labels, int64 ``(examples,)``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A data set and a network for it.

    Attributes:
        title: what it is, for the report.
        load: (training split, test split).
        network: a new network, initialised from torch's random state.
    """

    title: str
    load: Callable[[], tuple[Split, Split]]
    network: Callable[[], nn.Module]


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=bunch.target)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def _digits_network() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


TASKS = {
    "digits": Task(
        "scikit-learn's digits: real handwriting, 8x8 pixels, 898 images to train and 899 to test; "
        "a network of three 3x3 convolutions (32, 64, 64 channels)",
        _digits,
        _digits_network,
    )
}
