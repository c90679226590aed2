"""A whole network for inference, sparse where that is faster."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numba
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import SparseExecutionError
from ..report import Prepared, Row
from . import tuning
from .convolution import Images, SparseConvolution, Window, copy, mean, pack, places, pool
from .graph import Convolution, Network, changes_a_value
from .layout import Layout, aligned

_FREE = (-math.inf, math.inf)
#: Offsets into buffers are of 32 bits.
_FARTHEST = 2**31 - 1


@dataclass(frozen=True)
class _Laid:
    """Where a value lies: at the beginning of a buffer that values which are not alive together use in turn.

    Attributes:
        slot: number of the buffer.
        layout, channels: how, and how many.
    """

    slot: int
    layout: Layout
    channels: int


@dataclass(frozen=True)
class _Sparse:
    """A step: a convolution by its non-zeros. `source` and `residual` are packed first where `packs` says so."""

    node: fx.Node
    convolution: Convolution
    run: SparseConvolution
    source: _Laid
    target: _Laid
    residual: _Laid | None
    packs: tuple[bool, bool]

    @property
    def laid(self) -> tuple[_Laid | None, ...]:
        return self.source, self.target, self.residual


@dataclass(frozen=True)
class _Pool:
    """A step: a max pooling from one buffer into another."""

    node: fx.Node
    window: Window
    source: _Laid
    target: _Laid

    @property
    def laid(self) -> tuple[_Laid | None, ...]:
        return self.source, self.target


@dataclass(frozen=True)
class _Mean:
    """A step: averages of what lies in a buffer."""

    node: fx.Node
    source: _Laid

    @property
    def laid(self) -> tuple[_Laid | None, ...]:
        return (self.source,)


@dataclass(frozen=True)
class _Dense:
    """A step: a convolution by torch."""

    node: fx.Node
    convolution: Convolution
    weight: Tensor


@dataclass(frozen=True)
class _Torch:
    """A step: a node as torch runs it."""

    node: fx.Node


_Step = _Sparse | _Pool | _Mean | _Dense | _Torch


@dataclass
class _Program:
    """Steps for one shape of inputs.

    Attributes:
        steps: in order.
        slots: how many numbers each buffer has.
        last: values that nothing reads after a step.
        spare: workspaces that no call uses now.
    """

    steps: list[_Step]
    slots: list[int]
    last: dict[fx.Node, list[fx.Node]]
    spare: list[_Workspace] = field(default_factory=list)

    @contextmanager
    def workspace(self) -> Iterator[_Workspace]:
        """One that no other call uses meanwhile."""
        try:
            found = self.spare.pop()
        except IndexError:
            found = _Workspace(self)
        try:
            yield found
        finally:
            self.spare.append(found)


class _Workspace:
    """The memory that one call at a time works in."""

    def __init__(self, program: _Program) -> None:
        self.buffers = [aligned(size) for size in program.slots]
        sparse = [step for step in program.steps if isinstance(step, _Sparse)]
        shapes = [step.run.scratch_shape() for step in sparse]
        whole = aligned(max((rows * columns for rows, columns in shapes), default=0))
        self.scratch = {
            step.node: whole[: rows * columns].reshape(rows, columns)
            for step, (rows, columns) in zip(sparse, shapes, strict=True)
        }

        made = [step for step in program.steps if isinstance(step, (_Sparse, _Pool))]
        self.views = {
            step.node: step.target.layout.view(self.buffers[step.target.slot], step.target.channels) for step in made
        }
        self.images = {node: Images.of(view) for node, view in self.views.items()}

    def images_of(self, node: fx.Node, values: dict[fx.Node, Any]) -> Images:
        """Where the value of a node lies."""
        found = self.images.get(node)
        return Images.of(values[node]) if found is None else found


class Run(NamedTuple):
    """How a convolution of a sparse network is run.

    Attributes:
        layer: name of the module.
        density: share of its coefficients that are not zero.
        how: ``"direct"`` (each non-zero reads its input), ``"fused"`` (responses to the basis first), ``"dense"``.
        width, parts: pixels of a tile, and parts of the output channels; 0 where it is dense.
        bytes: of coefficients and positions, or of the dense kernels.
    """

    layer: str
    density: float
    how: str
    width: int
    parts: int
    bytes: int


class SparseNetwork(Prepared):
    """A network for inference that runs convolutions by their non-zeros where that is faster; `prepare` makes it.

    It has the values that the model had then. Inputs are float32 on the CPU; each new shape is prepared for once. Calls
    from several threads at once work in memory of their own.
    """

    def __init__(self, network: Network, choose: tuning.Chooser) -> None:
        super().__init__()
        self.plain = network.module
        self._network, self._choose = network, choose
        self._programs: dict[tuple[torch.Size, ...], _Program] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """The outputs of the model; no gradients.

        Raises:
            SparseExecutionError: an input is no float32 tensor on the CPU.
        """
        for each in inputs:
            check_input(each)
        program = self._program(inputs)
        with _one_at_a_time(), program.workspace() as workspace:
            return _execute(self._network, program, workspace, inputs)

    def runs(self, *inputs: Tensor) -> list[Run]:
        """How each convolution is run for inputs of these shapes, in order."""
        return [_run(step) for step in self._program(inputs).steps if isinstance(step, (_Sparse, _Dense))]

    def rows(self, calls: Sequence[tuple[Tensor, ...]]) -> list[Row]:
        """Of each convolution, for `ip_plugin.report`, which lists what is left to torch itself.

        Args:
            calls: inputs; if there are none, it is said how the inputs are run that the network was prepared for.
        """
        programs = [self._program(inputs) for inputs in calls] or [next(iter(self._programs.values()))]
        shapes = [self._network.shapes(inputs) for inputs in calls]
        steps: dict[str, list[tuple[int, _Sparse | _Dense]]] = {}
        for number, program in enumerate(programs):
            for step in program.steps:
                if isinstance(step, (_Sparse, _Dense)):
                    steps.setdefault(step.convolution.name, []).append((number, step))
        first_user: dict[bytes, str] = {}
        rows = []
        for name, taken in steps.items():
            positions = None
            if calls:
                positions = sum(shapes[number][step.node].numel() for number, step in taken)
                positions //= taken[0][1].convolution.entries.channels
            rows.append(_row(name, taken, positions, first_user))
        return rows

    def train(self, mode: bool = True) -> SparseNetwork:  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def _program(self, inputs: tuple[Tensor, ...]) -> _Program:
        _share_threads()
        key = tuple(each.shape for each in inputs)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = _compile(self._network, inputs, self._choose)
            return self._programs[key]


def _share_threads() -> None:
    """Give numba as many threads as torch has. OpenMP has one number for both, which numba sets when it begins."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _run(step: _Sparse | _Dense) -> Run:
    name, density = step.convolution.name, step.convolution.density
    if isinstance(step, _Dense):
        return Run(name, density, "dense", 0, 0, step.weight.numel() * step.weight.element_size())
    choice = step.run.choice
    return Run(name, density, choice.order, choice.width, choice.parts, step.run.plan.bytes)


def _row(
    name: str, taken: Sequence[tuple[int, _Sparse | _Dense]], positions: int | None, first_user: dict[bytes, str]
) -> Row:
    """Of a convolution, from its steps with the numbers of their programs."""
    convolution, runs = taken[0][1].convolution, [_run(step) for _, step in taken]
    shape = (convolution.entries.channels, convolution.inputs // convolution.groups, *convolution.window.kernel)
    parameters, nonzeros = math.prod(shape), len(convolution.entries.values)
    basis = convolution.entries.basis
    owner = "" if basis is None else first_user.setdefault(basis.tobytes(), name)
    narrow = min(convolution.inputs, convolution.entries.channels)
    transform = 0 if basis is None else basis.size * narrow
    return Row(
        layer=name,
        space="spatial" if basis is None else "interspace",
        shape=shape,
        parameters=parameters,
        nonzeros=nonzeros,
        sparsity=1 - nonzeros / parameters if parameters else 0.0,
        basis=owner,
        basis_parameters=basis.size if basis is not None and owner == name else 0,
        bytes_dense=4 * parameters,
        bytes_sparse=sum(run.bytes for (number, _), run in zip(taken, runs, strict=True) if number == 0),
        macs_dense=None if positions is None else positions * parameters,
        macs_nonzero=None if positions is None else positions * nonzeros,
        macs_basis=None if positions is None else positions * transform,
        runs=", ".join(dict.fromkeys(run.how for run in runs)),
    )


_SERIAL = threading.Lock()


def _one_at_a_time() -> AbstractContextManager[object]:
    """Numba's own threads, which it has where there is neither OpenMP nor TBB, can serve one call at a time."""
    try:
        return _SERIAL if numba.threading_layer() == "workqueue" else nullcontext()
    except ValueError:  # nothing has run yet
        return _SERIAL


def check_input(value: Any) -> None:
    """Raise SparseExecutionError unless it is a float32 tensor on the CPU."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
        found = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise SparseExecutionError("A sparse network must be given float32 tensors on the CPU.", found)


def _compile(network: Network, inputs: tuple[Tensor, ...], choose: tuning.Chooser) -> _Program:
    """Steps for inputs of these shapes."""
    shapes = network.shapes(inputs)
    gaps: dict[tuple[int, ...], tuple[int, int]] = {}
    for each in network.convolutions.values():
        size, (rows, columns) = shapes[each.source][2:], gaps.get(shapes[each.source][2:], (0, 0))
        if not each.window.steps:
            gaps[size] = max(rows, each.window.padding[0]), max(columns, each.window.padding[1])

    steps: list[_Step] = []
    slots: list[int] = []
    laid: dict[fx.Node, _Laid] = {}

    def new(layout: Layout, channels: int) -> _Laid:
        slots.append(layout.size(channels))
        return _Laid(len(slots) - 1, layout, channels)

    modules = dict(network.module.named_modules())
    copied: set[fx.Node] = set()
    for node in network.module.graph.nodes:
        if node in network.drawn_in:
            continue
        convolution = network.convolutions.get(node)
        if convolution is None and node in network.poolings and node.args[0] in laid:
            pooled = _pool(node, network.poolings[node], shapes, gaps, laid, new)
            steps.append(pooled)
            laid[node] = pooled.target
            continue
        if convolution is None and node in network.means and node.all_input_nodes[0] in laid:
            steps.append(_Mean(node, laid[node.all_input_nodes[0]]))
            continue
        if convolution is None:
            steps.append(_Torch(node))
            if changes_a_value(node, modules):  # which a copy does not see
                laid = {each: at for each, at in laid.items() if each not in copied}
            continue
        step = _sparse(node, convolution, shapes, gaps, laid, new, choose)
        if step is None:
            steps.append(_Dense(node, convolution, convolution.weight()))
            continue
        steps.append(step)
        laid[node] = step.target
        if step.packs[0] and not convolution.window.steps:
            laid[convolution.source] = step.source
            copied.add(convolution.source)
    program = _Program(steps, slots, _last_uses(steps))
    return _shared(network, program, inputs)


def _sparse(
    node: fx.Node, convolution: Convolution, shapes: dict[fx.Node, torch.Size],
    gaps: dict[tuple[int, ...], tuple[int, int]], laid: dict[fx.Node, _Laid],
    new: Callable[[Layout, int], _Laid], choose: tuning.Chooser,
) -> _Sparse | None:  # fmt: skip
    images, channels, height, width = shapes[convolution.source]
    gap = gaps.get(shapes[node][2:], (0, 0))
    source = laid.get(convolution.source)
    where = None
    if source is not None:
        where = places(convolution.window, images, height, width, gap, source.layout)
    packs = where is None
    if where is None:
        here = gaps.get((height, width), (0, 0))
        gap = max(gap[0], here[0]), max(gap[1], here[1])
        where = places(convolution.window, images, height, width, gap)
        assert where is not None
    if channels * len(where.phases) * where.source.stride > _FARTHEST:
        return None
    choice = choose(convolution, where, (height, width), packs)
    if choice is None:
        return None
    if packs:
        source = new(where.source, channels * len(where.phases))
    target = new(where.target, shapes[node][1])
    residual, packs_residual = None, False
    if convolution.residual is not None:
        residual = laid.get(convolution.residual)
        packs_residual = residual is None or residual.layout != where.target
        if packs_residual:
            residual = new(where.target, shapes[node][1])
    run = SparseConvolution(convolution.entries, convolution.bias, where, choice, convolution.limits)
    assert source is not None
    return _Sparse(node, convolution, run, source, target, residual, (packs, packs_residual))


def _pool(
    node: fx.Node, window: Window, shapes: dict[fx.Node, torch.Size], gaps: dict[tuple[int, ...], tuple[int, int]],
    laid: dict[fx.Node, _Laid], new: Callable[[Layout, int], _Laid],
) -> _Pool:  # fmt: skip
    source = laid[node.all_input_nodes[0]]
    images, channels, height, width = shapes[node]
    rows, columns = gaps.get((height, width), (0, 0))
    pitch = width + columns
    layout = Layout(images, height, width, height + rows, pitch, rows * pitch + columns)
    return _Pool(node, window, source, new(layout, channels))


def _reads(step: _Step) -> list[fx.Node]:
    if isinstance(step, (_Torch, _Pool, _Mean)):
        return step.node.all_input_nodes
    return [each for each in (step.convolution.source, step.convolution.residual) if each is not None]


def _last_uses(steps: list[_Step]) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for step in steps:
        for each in (step.node, *_reads(step)):
            last[each] = step.node
    by_step: dict[fx.Node, list[fx.Node]] = {}
    for each, step_node in last.items():
        by_step.setdefault(step_node, []).append(each)
    return by_step


def _shared(network: Network, program: _Program, inputs: tuple[Tensor, ...]) -> _Program:
    """The same program with as few buffers as can be: run once, to see which values are views of which buffer."""
    workspace = _Workspace(program)
    owner = {torch.from_numpy(each).untyped_storage().data_ptr(): slot for slot, each in enumerate(workspace.buffers)}
    ends = [0] * len(program.slots)
    begins = [len(program.steps)] * len(program.slots)
    number = {step.node: place for place, step in enumerate(program.steps)}
    use: dict[fx.Node, int] = {each: number[step] for step, nodes in program.last.items() for each in nodes}
    for place, step in enumerate(program.steps):
        if isinstance(step, (_Sparse, _Pool, _Mean)):
            for laid in step.laid:
                if laid is not None:
                    begins[laid.slot] = min(begins[laid.slot], place)
                    ends[laid.slot] = max(ends[laid.slot], place)

    def watch(node: fx.Node, value: Any) -> None:
        for each in _tensors(value):
            slot = owner.get(each.untyped_storage().data_ptr())
            if slot is not None:
                ends[slot] = max(ends[slot], use[node])

    _execute(network, program, workspace, inputs, watch)

    sizes: list[int] = []
    busy_until: list[int] = []
    place_of: dict[int, int] = {}
    for slot in sorted(range(len(program.slots)), key=begins.__getitem__):
        size = program.slots[slot]
        free = [each for each in range(len(sizes)) if busy_until[each] < begins[slot]]
        # the one that fits best; if none is large enough, the largest grows
        chosen = min(free, key=lambda each: (sizes[each] < size, abs(sizes[each] - size)), default=len(sizes))
        if chosen == len(sizes):
            sizes.append(0)
            busy_until.append(0)
        sizes[chosen], busy_until[chosen] = max(size, sizes[chosen]), ends[slot]
        place_of[slot] = chosen

    def moved(laid: _Laid) -> _Laid:
        return replace(laid, slot=place_of[laid.slot])

    steps: list[_Step] = []
    for step in program.steps:
        if isinstance(step, (_Sparse, _Pool)):
            step = replace(step, source=moved(step.source), target=moved(step.target))
        if isinstance(step, _Sparse) and step.residual is not None:
            step = replace(step, residual=moved(step.residual))
        if isinstance(step, _Mean):
            step = replace(step, source=moved(step.source))
        steps.append(step)
    return _Program(steps, sizes, program.last)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [each for item in value for each in _tensors(item)]
    return []


def _execute(
    network: Network, program: _Program, workspace: _Workspace, inputs: tuple[Tensor, ...],
    watch: Callable[[fx.Node, Any], None] | None = None,
) -> Any:  # fmt: skip
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for step in program.steps:
        node = step.node
        if isinstance(step, _Sparse):
            values[node] = _run_sparse(step, workspace, values)
        elif isinstance(step, _Pool):
            read, write = workspace.buffers[step.source.slot], workspace.buffers[step.target.slot]
            pool(step.window, step.source.layout, step.source.channels, step.target.layout, read, write)
            values[node] = workspace.views[node]
        elif isinstance(step, _Mean):
            values[node] = mean(step.source.layout, step.source.channels, workspace.buffers[step.source.slot])
        elif isinstance(step, _Dense):
            values[node] = _run_dense(step, values)
        elif node.op == "placeholder":
            values[node] = next(given)
        else:
            arguments, named = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return _owned(arguments[0])
            values[node] = _call(network.module, node, arguments, named)
        if watch is not None:
            watch(node, values[node])
        for each in program.last.get(node, ()):
            values.pop(each, None)
    raise AssertionError("a graph ends with its output")


def _run_sparse(step: _Sparse, workspace: _Workspace, values: dict[fx.Node, Any]) -> Tensor:
    convolution, run = step.convolution, step.run
    source, target = workspace.buffers[step.source.slot], workspace.buffers[step.target.slot]
    if step.packs[0]:
        pack(workspace.images_of(convolution.source, values), run.where, convolution.window, source)
    residual = None
    if step.residual is not None:
        residual = workspace.buffers[step.residual.slot]
        if step.packs[1]:
            assert convolution.residual is not None
            copy(workspace.images_of(convolution.residual, values), step.residual.layout, residual)
    run(source, target, workspace.scratch[step.node], residual)
    return workspace.views[step.node]


def _run_dense(step: _Dense, values: dict[fx.Node, Any]) -> Tensor:
    convolution, bias = step.convolution, torch.from_numpy(step.convolution.bias)
    made = F.conv2d(values[convolution.source], step.weight, bias, *convolution.window[1:], convolution.groups)
    if convolution.residual is not None:
        made += values[convolution.residual]
    return made if convolution.limits == _FREE else made.clamp_(*convolution.limits)


def _call(module: fx.GraphModule, node: fx.Node, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if node.op == "call_function":
        return node.target(*arguments, **named)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **named)
    found: Any = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found if node.op == "get_attr" else found(*arguments, **named)


def _owned(value: Any) -> Any:
    """Outputs that no later call writes to."""
    return fx.node.map_aggregate(value, lambda each: each.clone() if isinstance(each, Tensor) else each)
