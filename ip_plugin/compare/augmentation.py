"""Augmentation: transforms of `torchvision.transforms.v2` by text, applied to each image by itself.

>>> import torch
>>> augment = Augmentation(("RandomHorizontalFlip(p=1.0)",))
>>> augment(torch.arange(3.0).reshape(1, 1, 1, 3), torch.Generator().manual_seed(0))
tensor([[[[2., 1., 0.]]]])
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from ip_plugin.errors import StudyError
from ip_plugin.utils.seeds import seeded

from .config import nearest


class Augmentation:
    """Transforms in their order; every random number is drawn from the generator that they are called with.

    Args:
        texts: such as ``"RandomCrop(32, padding=4)"``.

    Raises:
        StudyError: a text is not understood, or torchvision is not installed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._parsed = [_parsed(text) for text in texts]
        self._batched = [_batched(*parsed) for parsed in self._parsed]
        assert self.transforms is not None  # builds them, which checks them

    @cached_property
    def transforms(self) -> list[Callable[[Any], Any]]:
        """The transforms of torchvision, for one image."""
        return [_transform(*parsed) for parsed in self._parsed]

    def __call__(self, images: Tensor, order: Generator) -> Tensor:
        """A batch of images, each transformed by itself."""
        for batched, transform in zip(self._batched, self.transforms, strict=True):
            if batched is not None:
                images = batched(images, order)
                continue
            with seeded(int(torch.randint(1 << 62, (), generator=order))):
                images = torch.stack([transform(image) for image in images])
        return images

    def one(self, image: Any) -> Any:
        """One image, with random numbers of the process."""
        for transform in self.transforms:
            image = transform(image)
        return image


def _parsed(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, arguments and keyword arguments of a call whose arguments are literals; a name alone is called without."""
    rule = "A transform must be a name, or a call whose arguments are numbers, texts, tuples or lists."
    remedy = 'write for example "RandomCrop(32, padding=4)"'
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, [], {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            return call.func.id, [ast.literal_eval(value) for value in call.args], options
    except (SyntaxError, ValueError) as error:
        raise StudyError(rule, f"{text!r}: {error}", remedy) from None
    raise StudyError(rule, f"{text!r}", remedy)


def torchvision(what: str) -> Any:
    """The package torchvision.

    Raises:
        StudyError: it is not installed.
    """
    try:
        import torchvision as package
        import torchvision.transforms.v2
    except ImportError as error:
        remedy = "run: pip install torchvision, in the version that fits torch"
        raise StudyError(f"For {what}, torchvision must be installed.", str(error), remedy) from error
    return package


def _transform(name: str, arguments: list[Any], options: dict[str, Any]) -> Callable[[Any], Any]:
    v2 = torchvision("augmentation").transforms.v2
    kinds = {kind: cls for kind, cls in vars(v2).items() if isinstance(cls, type) and issubclass(cls, v2.Transform)}
    kinds.pop("Transform")
    if name not in kinds:
        raise StudyError("A transform must be one of torchvision.transforms.v2.", f"{name!r}", nearest(name, kinds))
    try:
        made: Callable[[Any], Any] = kinds[name](*arguments, **options)
    except (TypeError, ValueError) as error:
        rule = f"The arguments of the transform {name!r} must be those of torchvision."
        raise StudyError(rule, str(error), f"see torchvision.transforms.v2.{name}") from error
    return made


def _batched(name: str, arguments: list[Any], options: dict[str, Any]) -> Callable[[Tensor, Generator], Tensor] | None:
    """The same as a transform for a whole batch at once, which is many times faster; None if there is none here."""
    given = dict(zip({"RandomCrop": ("size", "padding")}.get(name, ("p",)), arguments, strict=False)) | options
    if name in ("RandomHorizontalFlip", "RandomVerticalFlip") and given.keys() <= {"p"}:
        return _flip(given.get("p", 0.5), 3 if name == "RandomHorizontalFlip" else 2)
    whole = all(isinstance(value, int) for value in given.values())
    if name == "RandomCrop" and given.keys() in ({"size"}, {"size", "padding"}) and len(arguments) < 3 and whole:
        return _crop(given["size"], given.get("padding", 0))
    return None


def _flip(share: float, dim: int) -> Callable[[Tensor, Generator], Tensor]:
    def flip(images: Tensor, order: Generator) -> Tensor:
        chosen = torch.rand((len(images), 1, 1, 1), generator=order).to(images.device) < share
        return torch.where(chosen, images.flip(dim), images)

    return flip


def _crop(size: int, padding: int) -> Callable[[Tensor, Generator], Tensor]:
    def crop(images: Tensor, order: Generator) -> Tensor:
        padded = torch.nn.functional.pad(images, [padding] * 4)
        room = padded.shape[2] - size, padded.shape[3] - size
        if min(room) < 0:
            found = f"images of {images.shape[2]} x {images.shape[3]} pixels, padding {padding}"
            raise StudyError(f"To crop {size} pixels, images must be as large.", found, "crop less, or pad more")
        device = images.device
        top, left = (torch.randint(most + 1, (len(images), 1), generator=order).to(device) for most in room)
        rows, columns = (first + torch.arange(size, device=device) for first in (top, left))
        chosen = torch.arange(len(images), device=device)[:, None, None]
        values = padded.permute(0, 2, 3, 1)[chosen, rows[:, :, None], columns[:, None, :]]
        return values.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    return crop
