"""Steps that act on each pixel by itself, or only move pixels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from .activation import NONE
from .convolution import Convolution
from .images import Packing
from .kernels import images as loops
from .memory import Region, Workspace
from .nodes import bound, can_be_delayed, joined_channels, module_of, only_user
from .placement import Placement
from .pointwise import Pointwise
from .steps import NO_ADDEND, NO_SCALE, NOTHING, Pack, Step, Values, images_in, into, read


def _in_place(source: Region, target: Region, addend: Region | None = None) -> dict[Region, Region]:
    """What `pointwise` may overwrite: one image, run as one row; it writes zeros behind rows, where others begin."""
    one_row = source.layout.images == 1 and (addend is None or addend.layout.pitch == source.layout.pitch)
    return {target: source} if one_row else {}


@dataclass(eq=False)
class Elementwise(Step):
    """A scale and a shift of each channel, an addition, and an activation, from one or two regions into another."""

    module: Pointwise
    source: Region
    addend: Region | None
    target: Region

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        module, nodes = module_of(node), [value for value in node.args if isinstance(value, fx.Node)]
        if not isinstance(module, Pointwise) or placement.regions.keys().isdisjoint(nodes):
            return []
        if not all(map(placement.is_images, nodes)):
            return []
        steps, source = read(node, nodes[0], placement)
        addend = None
        if len(nodes) > 1:
            more, addend = read(node, nodes[1], placement)
            steps += more
        return [*steps, cls(node, module, source, addend, placement.place(node))]

    @property
    def overwrites(self) -> dict[Region, Region]:
        return _in_place(self.source, self.target, self.addend)

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        layout, scale, shift = self.source.layout, self.module.scale, self.module.shift
        call = partial(
            loops.pointwise, layout.images, self.source.channels, layout.height, layout.width,
            layout.one_run(self.target.layout, None if self.addend is None else self.addend.layout),
            NOTHING[0] if shift is None else shift.float().numpy(),
            *(NO_SCALE if scale is None else (scale.float().numpy(), 0, 1, 0)),
            *images_in(workspace, self.source), *images_in(workspace, self.addend), *self.module.activation.arguments,
            *images_in(workspace, self.target),
        )  # fmt: skip
        return into(self.node, workspace.view(self.target), call)


@dataclass(eq=False)
class Scale(Step):
    """The product of a region and a number for each image and channel, as in squeeze-and-excitation.

    Without a target its value is these numbers, and the convolution behind multiplies its coefficients with them.
    """

    value: fx.Node
    source: Region
    target: Region | None

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        arguments = bound(node, "input", "other")
        multiplies = node.op in ("call_function", "call_method") and node.target in (operator.mul, torch.mul, "mul")
        nodes = list(arguments.values()) if multiplies and arguments else []
        if len(nodes) != 2 or not all(isinstance(value, fx.Node) and placement.is_images(value) for value in nodes):
            return []
        for images, numbers in (nodes, nodes[::-1]):
            shape = placement.shapes[images]
            if placement.shapes[numbers] == (*shape[:2], 1, 1) and images in placement.regions and shape[2:] != (1, 1):
                if _can_be_drawn_in(node, images, placement):
                    return [cls(node, numbers, placement.regions[images], None)]
                return [cls(node, numbers, placement.regions[images], placement.place(node))]
        return []

    @property
    def overwrites(self) -> dict[Region, Region]:
        return {} if self.target is None else _in_place(self.source, self.target)

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        node, numbers, layout = self.node, self.value, self.source.layout
        if self.target is None:
            return lambda values: values.update({node: values[numbers]})
        view = workspace.view(self.target)
        sizes = layout.images, self.source.channels, layout.height, layout.width
        shifts = layout.one_run(self.target.layout), NOTHING[0]
        source, target = images_in(workspace, self.source), images_in(workspace, self.target)
        rest = (*NO_ADDEND, *NONE.arguments, *target)

        def run(values: Values) -> None:
            scales = values[numbers]
            images, channels = scales.stride()[:2]
            flat = scales.as_strided(((scales.shape[0] - 1) * images + (scales.shape[1] - 1) * channels + 1,), (1,))
            loops.pointwise(*sizes, *shifts, flat.numpy(), 0, channels, images, *source, *rest)
            values[node] = view

        return run


def _can_be_drawn_in(node: fx.Node, images: fx.Node, placement: Placement) -> bool:
    """Whether the convolution that alone reads a product of images and a number for each channel can compute it.

    It multiplies its coefficients with the numbers instead, which it can if there is one image. If so, `placement`
    knows the product and the choice.
    """
    user = only_user(node)
    layer = None if user is None else module_of(user)
    if user is None or not isinstance(layer, Convolution) or placement.shapes[node][0] > 1:
        return False
    if user.args[0] is not node or node in user.args[1:] or not can_be_delayed(node, user):
        return False
    placement.scaled[node] = images
    choice = placement.choice(user)
    if choice is None or choice.order == "winograd":
        del placement.scaled[node]
        return False
    placement.decided[user] = choice
    return True


@dataclass(eq=False)
class Concatenation(Step):
    """The concatenation of channels in one region; what was not made there is copied first."""

    target: Region

    @classmethod
    def lower(cls, node: fx.Node, placement: Placement) -> list[Step]:
        parts = joined_channels(node)
        if not parts or not placement.is_images(node) or not all(map(placement.is_images, parts)):
            return []
        if placement.regions.keys().isdisjoint(parts):
            return []
        whole, steps, begin = placement.place(node), [], 0
        for part in parts:
            channels, source = placement.shapes[part][1], placement.regions.get(part)
            target = Region(whole.layout, channels, whole, begin)
            if source is None or (source.root, source.first_channel, source.layout) != (
                target.root, target.first_channel, whole.layout,
            ):  # fmt: skip
                original, shape = placement.original(part), placement.shapes[part]
                steps.append(Pack(node, part, shape, Packing.whole(whole.layout), target, original))
                placement.remember_copy(part, target)
            begin += channels
        return [*steps, cls(node, whole)]

    def bind(self, workspace: Workspace) -> Callable[[Values], None]:
        return into(self.node, workspace.view(self.target), lambda: None)
