"""Networks of studies: built in, of torchvision, of timm, or other people's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ip_plugin.errors import StudyError

from . import config
from .config import nearest
from .named import blamed, called, is_named, named


def network(model: config.Model, classes: int, example: Tensor) -> nn.Module:
    """A new network, initialised from torch's random state.

    Args:
        model: what a study says of it.
        classes: number of its outputs.
        example: a batch of one image.

    Raises:
        StudyError: there is no such network, its options are wrong, or it does not take such images.
    """
    channels, pixels = example.shape[1], min(example.shape[2:])
    made = _made(model, classes, channels, pixels)
    if not isinstance(made, nn.Module):
        rule = f"The model {model.name!r} must be a module of torch."
        raise StudyError(rule, f"a {type(made).__name__}", "let the function return a module")
    _check(made, model.name, classes, example)
    return made


#: Networks of torchvision whose further outputs, which only help to train, would need a loss of their own.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def _made(model: config.Model, classes: int, channels: int, pixels: int) -> Any:
    name = model.name if model.name != "auto" else "convnet" if pixels < 16 else "vgg"
    if name in NETWORKS:
        if model.options or model.stem == "imagenet":
            rule = "A built-in network must have no options and no other stem."
            raise StudyError(rule, f"{name!r}: options {model.options}, stem {model.stem!r}", "leave them out")
        return NETWORKS[name](channels, classes)
    if is_named(name):
        function = named(name, "model")
        given = {"num_classes": classes, "in_channels": channels}
        taken = {key: value for key, value in given.items() if key in _parameters(function)} | model.options
        return called(name, "model", function, **taken)
    known: list[str] = list(NETWORKS)
    with suppress(ImportError):
        import torchvision.models as models

        theirs = models.list_models(module=models)
        if name in theirs:
            options = {"weights": None, "num_classes": classes} | model.options
            if name in _WITH_AUXILIARY:
                options = {"aux_logits": False, "init_weights": True} | options
            built = called(name, "model", models.get_model, name, **options)
            _take_channels(built, channels)
            return _with_stem(built, model, pixels)
        known += theirs
    with suppress(ImportError):
        import timm

        if name.partition(".")[0] in timm.list_models():
            options = {"num_classes": classes, "in_chans": channels} | model.options
            return _with_stem(called(name, "model", timm.create_model, name, **options), model, pixels)
        known += timm.list_models()
    rule = "The model must be auto, a built-in network, one of torchvision or timm (if installed), or module:function."
    raise StudyError(rule, f"{name!r}", nearest(name, ["auto", *known]))


def _parameters(function: Callable[..., Any]) -> set[str]:
    with suppress(TypeError, ValueError):
        return set(inspect.signature(function).parameters)
    return set()


def _check(made: nn.Module, name: str, classes: int, example: Tensor) -> None:
    """Raise StudyError unless the network gives one number for each class."""
    training, state = made.training, torch.get_rng_state()
    made.eval()
    try:
        with torch.no_grad():
            outputs = made(example.cpu())
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        found = None if shape == (1, classes) else f"outputs {shape}"
    except Exception as error:  # code of other people
        found = blamed(error)
    finally:
        made.train(training)
        torch.set_rng_state(state)
    if found:
        rule = f"The model {name!r} must give {classes} outputs for an image of shape {tuple(example.shape[1:])}."
        raise StudyError(rule, found, "set options of the model, image_size or stem, or take another model")


def _first_convolution(model: nn.Module) -> nn.Conv2d | None:
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


@torch.no_grad()
def _take_channels(model: nn.Module, channels: int) -> None:
    """Let a network of torchvision, which takes three channels, take another number."""
    first = _first_convolution(model)
    if first is None or first.in_channels == channels:
        return
    chosen = torch.arange(channels) % first.in_channels
    first.weight = nn.Parameter(first.weight[:, chosen].contiguous())
    first.in_channels = channels


def _with_stem(built: nn.Module, model: config.Model, pixels: int) -> nn.Module:
    """The network with the first layers that a study asks for; by itself one of patches keeps its own."""
    first = _first_convolution(built)
    overlaps = first is not None and tuple(first.kernel_size) != tuple(first.stride)
    if model.stem == "small" and not overlaps:
        rule = "A small stem must replace a convolution whose windows overlap."
        found = f"{model.name!r} begins with {first or 'no convolution'}"
        raise StudyError(rule, found, 'set stem = "imagenet", and the size of patches by options of the model')
    if overlaps and (model.stem == "small" or (model.stem == "auto" and pixels <= 64)):
        _make_small(built)
    return built


@torch.no_grad()
def _make_small(model: nn.Module) -> None:
    """Fit the first layers to small images: a 3x3 convolution with stride 1, and no pooling before the next one.

    The 3x3 filters are the centres of the initial filters, scaled to the variance that a 3x3 convolution has.
    """
    modules = list(model.named_modules())
    first = _first_convolution(model)
    assert first is not None
    if set(first.stride) == {1}:
        return
    size = first.kernel_size
    if first.weight.shape[2] >= 3:
        top, left = ((length - 3) // 2 for length in size)
        centre = first.weight[:, :, top : top + 3, left : left + 3] * (size[0] * size[1] / 9) ** 0.5
    else:
        centre = nn.functional.pad(first.weight, (0, 3 - size[1], 0, 3 - size[0]))
    first.weight = nn.Parameter(centre.contiguous())
    first.kernel_size, first.stride, first.padding = (3, 3), (1, 1), (1, 1)
    first._reversed_padding_repeated_twice = [1, 1, 1, 1]
    after = iter(modules[[module for _, module in modules].index(first) + 1 :])
    for place, module in after:
        if isinstance(module, nn.Conv2d):
            return
        if isinstance(module, nn.MaxPool2d):
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
            return


# Built-in networks


def _vgg(inputs: int, classes: int, *widths: int | str) -> nn.Module:
    """3x3 convolutions of these widths ("M" is max pooling), then average pooling and a linear layer."""
    modules: list[nn.Module] = []
    for width in widths:
        if isinstance(width, str):
            modules.append(nn.MaxPool2d(2))
        else:
            modules += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


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


def _resnet(inputs: int, classes: int, *widths: int) -> nn.Module:
    """A 3x3 convolution and max pooling, residual blocks of these widths, average pooling and a linear layer."""
    first = widths[0]
    stem = [nn.Conv2d(inputs, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [_Residual(*pair) for pair in zip((first, *widths), widths, strict=False)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


#: Called with the number of channels of images and the number of classes: three 3x3 convolutions, six, and a ResNet of
#: a convolution and three residual blocks.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "convnet": lambda channels, classes: _vgg(channels, classes, 32, 64, "M", 64),
    "vgg": lambda channels, classes: _vgg(channels, classes, 16, "M", 32, "M", 64, 64, "M", 128, 128),
    "resnet": lambda channels, classes: _resnet(channels, classes, 32, 64, 128),
}
