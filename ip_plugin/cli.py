"""The command `ip-plugin`."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from . import __version__, bake, load
from .checkpoint import container
from .checkpoint.inspection import inspect
from .compare import criteria as known_criteria
from .compare.cell import Engine, here
from .compare.config import Settings, Study
from .compare.deployment import check_alone
from .compare.engines.nni import NniEngine
from .compare.engines.processes import Processes
from .compare.study import compare as run_study
from .compare.tasks import TASKS
from .errors import InterspaceError
from .utils.atomic import replacing

T = TypeVar("T")
DEFAULT = Study()
THERE: dict[str, Any] = {"exists": True, "dir_okay": False, "readable": True}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def run() -> None:
    """Run the command; a user's mistake is a message and exit status 2, not a traceback."""
    try:
        app()
    except InterspaceError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Interspace pruning: prune filter coefficients instead of weights."""
    if version:
        print(__version__)
        raise typer.Exit


def _values(text: str, read: Callable[[str], T], option: str) -> tuple[T, ...]:
    """The values of a comma-separated option."""
    try:
        return tuple(read(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint=f"--{option}") from error


def _text(values: tuple[Any, ...]) -> str:
    return ",".join(map(str, values))


@app.command()
def compare(
    criteria: Annotated[str, typer.Option(help="Names, comma-separated; see `ip-plugin criteria`.")] = _text(
        DEFAULT.criteria
    ),
    sparsities: Annotated[str, typer.Option(help="Fractions, comma-separated.")] = _text(DEFAULT.sparsities),
    spaces: Annotated[str, typer.Option(help="spatial, interspace, or both.")] = _text(DEFAULT.spaces),
    seeds: Annotated[str, typer.Option(help="Numbers, comma-separated.")] = _text(DEFAULT.seeds),
    task: Annotated[str, typer.Option(help=f"What is learned: {', '.join(TASKS)}.")] = DEFAULT.settings.task,
    data: Annotated[
        str | None,
        typer.Option(help="cifar10...: torchvision's folder of it, or an .npz file of its arrays."),
    ] = None,
    train_images: Annotated[int | None, typer.Option(help="Use only so many of the training images.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of training.")] = DEFAULT.settings.epochs,
    finetune_epochs: Annotated[
        int, typer.Option(help="Epochs after pruning a trained network.")
    ] = DEFAULT.settings.finetune_epochs,
    basis: Annotated[str, typer.Option(help="standard, orthonormal or dct.")] = DEFAULT.settings.basis,
    sharing: Annotated[str, typer.Option(help="layer (a basis for each) or model (one).")] = DEFAULT.settings.sharing,
    constraint: Annotated[
        str, typer.Option(help="What holds of the filters of bases: unit (norm), orthonormal or none.")
    ] = DEFAULT.settings.constraint,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULT.settings.lr,
    basis_lr: Annotated[float, typer.Option(help="That of the bases, as a multiple.")] = DEFAULT.settings.basis_lr,
    device: Annotated[str, typer.Option(help="As torch names it: cpu, cuda, mps.")] = DEFAULT.settings.device,
    deploy: Annotated[
        bool,
        typer.Option("--deploy", help="Also measure each network's compact file, and its latency when run sparse."),
    ] = False,
    deploy_threads: Annotated[
        int | None, typer.Option(help="Threads that latencies are measured with. Without it: 1.", min=1)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ip-compare"),
    engine: Annotated[str, typer.Option(help="local (on this machine) or nni (as an NNI experiment).")] = "local",
    jobs: Annotated[int, typer.Option(help="Runs at once, of the local engine; they share the threads.", min=1)] = 1,
    nni_config: Annotated[
        Path | None, typer.Option(help="NNI's YAML file: training service, limits. Without it: this machine.")
    ] = None,
    nni_port: Annotated[
        int | None,
        typer.Option(help="Of NNI's web portal. Without it: the first free one from 8080.", min=1, max=65535),
    ] = None,
    nni_concurrency: Annotated[
        int | None, typer.Option(help="Trials at once. Without it: as the file says, or 1.", min=1)
    ] = None,
) -> None:
    """Train and prune a small network in both spaces, and show which one is more accurate.

    Without options: scikit-learn's digits, two criteria, three sparsities, five seeds, in about two minutes on
    two cores. Stopped and started again, it goes on where it was, with either engine.
    """
    if deploy_threads is not None and not deploy:
        raise typer.BadParameter("is an option of --deploy", param_hint="--deploy-threads")
    study = Study(
        settings=Settings(
            task=task,
            data=data,
            train_images=train_images,
            basis=basis,  # type: ignore[arg-type]  # checked there
            sharing=sharing,  # type: ignore[arg-type]
            constraint=constraint,  # type: ignore[arg-type]
            epochs=epochs,
            finetune_epochs=finetune_epochs,
            lr=lr,
            basis_lr=basis_lr,
            device=device,
            deploy_threads=(deploy_threads or 1) if deploy else None,
        ),
        criteria=_values(criteria, str, "criteria"),
        sparsities=_values(sparsities, float, "sparsities"),
        spaces=_values(spaces, str, "spaces"),  # type: ignore[arg-type]
        seeds=_values(seeds, int, "seeds"),
    )
    if jobs > 1 or engine == "nni":
        check_alone(study.settings.deploy_threads, f"--jobs {jobs}" if jobs > 1 else "--engine nni")
    console = Console()
    cells: Engine = here if jobs == 1 else Processes(jobs)
    if engine == "nni" and jobs > 1:
        raise typer.BadParameter("for --engine nni it is --nni-concurrency", param_hint="--jobs")
    if engine == "nni":
        cells = NniEngine(nni_config, nni_port, nni_concurrency, lambda url: console.print(f"NNI's web portal: {url}"))
    elif engine != "local":
        raise typer.BadParameter(f"{engine!r} is neither local nor nni", param_hint="--engine")
    elif (nni_config, nni_port, nni_concurrency) != (None, None, None):
        raise typer.BadParameter("options of NNI need --engine nni", param_hint="--nni-...")
    try:
        failures = run_study(study, output, console, command=shlex.join(["ip-plugin", *sys.argv[1:]]), engine=cells)
    except KeyboardInterrupt:
        console.print(f"stopped; what has finished is in {output}, and the same command goes on from there")
        raise typer.Exit(130) from None
    if failures:
        raise typer.Exit(1)


@app.command("inspect")
def inspect_file(file: Annotated[Path, typer.Argument(help="What `ip_plugin.save` has written.", **THERE)]) -> None:
    """Show what is in a compact file, and check all of it; the model is not needed."""
    console = Console()
    found = inspect(file)
    (console if console.is_terminal else Console(width=160)).print(found)


@app.command("bake")
def bake_file(
    file: Annotated[Path, typer.Argument(help="What `ip_plugin.save` has written.", **THERE)],
    model: Annotated[
        str, typer.Option(help="package.module:function that builds the plain model; it is imported and called.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="FILE.safetensors for safetensors, any other name for torch.save.")
    ],
) -> None:
    """Write the state dict of the ordinary network that a compact file holds: kernels composed, masks applied."""
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(output.parent)!r}", param_hint="--output")
    baked = bake(load(_built(model), file)).state_dict()
    with replacing(output) as temporary:
        if output.suffix == ".safetensors":
            # safetensors refuses tensors that share memory, as tied weights do.
            contents = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in baked.items()}
            container.safetensors().torch.save_file(contents, temporary)
        else:
            torch.save(baked, temporary)


def _built(name: str) -> nn.Module:
    """The model that a function builds, which is named as ``package.module:function``."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        built = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise typer.BadParameter(f"{name!r}: {error}", param_hint="--model") from error
    if not isinstance(built, nn.Module):
        raise typer.BadParameter(f"{name!r} gives a {type(built).__name__}, not a module", param_hint="--model")
    return built


@app.command("criteria")
def list_criteria() -> None:
    """List the criteria that can be compared."""
    table = Table("name", "what it does")
    for name, criterion in known_criteria.available().items():
        table.add_row(name, criterion.title)
    Console().print(table)
