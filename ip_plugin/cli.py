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
from typer import Argument, Option

from . import __version__, bake, load
from .checkpoint import container
from .checkpoint.inspection import inspect
from .compare import criteria as known_criteria
from .compare.config import Settings, Study
from .compare.deployment import check_alone
from .compare.engines import Engine, EngineError
from .compare.engines.local import local
from .compare.engines.nni import NniEngine
from .compare.engines.processes import Processes
from .compare.tasks import TASKS
from .errors import InterspaceError
from .launcher import command as launcher
from .utils.atomic import replacing

T = TypeVar("T")
CompactFile = Annotated[
    Path, Argument(help="File written by `ip_plugin.save`.", exists=True, dir_okay=False, readable=True)
]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def run() -> None:
    """Run the command. A user's mistake or an engine that fails is a message and exit status 2, not a traceback."""
    try:
        app()
    except (InterspaceError, EngineError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    """Interspace pruning: prune filter coefficients instead of weights."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command("run", add_help_option=False, context_settings={"ignore_unknown_options": True})
def run_script(arguments: list[str]) -> None:
    """Run a script that trains and prunes, as it is, in the interspace."""
    launcher.main(arguments)


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
    criteria: Annotated[str, Option(help="Criteria, comma-separated; `ip-plugin criteria` lists them.")] = _text(
        Study.criteria
    ),
    sparsities: Annotated[
        str, Option(help="Fractions of the entries (or channels) to prune, comma-separated.")
    ] = _text(Study.sparsities),
    spaces: Annotated[str, Option(help="spatial, interspace, or both, comma-separated.")] = _text(Study.spaces),
    seeds: Annotated[str, Option(help="Random seeds, comma-separated.")] = _text(Study.seeds),
    task: Annotated[str, Option(help=f"Data set and network: {', '.join(TASKS)}.")] = Settings.task,
    data: Annotated[
        str | None, Option(help="Data of the cifar10 tasks: torchvision's folder, or an .npz file.")
    ] = None,
    train_images: Annotated[int | None, Option(help="Use only this many training images.")] = None,
    epochs: Annotated[int, Option(help="Epochs of training.")] = Settings.epochs,
    finetune_epochs: Annotated[
        int, Option(help="Epochs of fine-tuning after a trained network was pruned.")
    ] = Settings.finetune_epochs,
    basis: Annotated[str, Option(help="Initial filter bases: standard, orthonormal or dct.")] = Settings.basis,
    sharing: Annotated[
        str, Option(help="layer (one basis for each layer) or model (one for each kernel shape).")
    ] = Settings.sharing,
    constraint: Annotated[
        str, Option(help="Constraint on basis filters: unit (norm), orthonormal or none.")
    ] = Settings.constraint,
    lr: Annotated[float, Option(help="Peak learning rate.")] = Settings.lr,
    basis_lr: Annotated[float, Option(help="Learning rate of the bases, as a multiple of --lr.")] = Settings.basis_lr,
    device: Annotated[str, Option(help="Torch device: cpu, cuda, mps.")] = Settings.device,
    deploy: Annotated[
        bool, Option("--deploy", help="Also measure the file size and the sparse latency of each pruned network.")
    ] = False,
    deploy_threads: Annotated[
        int | None, Option(help="Threads with which latencies are measured; 1 by default.", min=1)
    ] = None,
    output: Annotated[Path, Option(help="Folder for the results.")] = Path("ip-compare"),
    engine: Annotated[str, Option(help="local (on this machine) or nni (as an NNI experiment).")] = "local",
    jobs: Annotated[int, Option(help="Processes of the local engine; they share the threads.", min=1)] = 1,
    nni_config: Annotated[
        Path | None, Option(help="NNI's YAML file, for training service and limits; by default this machine.")
    ] = None,
    nni_port: Annotated[
        int | None,
        Option(help="Port of NNI's web portal; by default the first free one from 8080.", min=1, max=65535),
    ] = None,
    nni_concurrency: Annotated[
        int | None, Option(help="NNI trials at once; by default as the YAML file says, or 1.", min=1)
    ] = None,
) -> None:
    """Train and prune a small network in both spaces, and show which one is more accurate.

    Without options: scikit-learn's digits, two criteria, three sparsities and five seeds, in about two minutes on
    two cores. An interrupted study is resumed by the same command, with either engine.
    """
    from .compare.study import compare as run_study  # imports pandas, which other commands do without

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
    cells = _engine(engine, jobs, (nni_config, nni_port, nni_concurrency), console)
    try:
        failures = run_study(study, output, console, command=shlex.join(["ip-plugin", *sys.argv[1:]]), engine=cells)
    except KeyboardInterrupt:
        console.print(f"stopped; what has finished is in {output}, and the same command goes on from there")
        raise typer.Exit(130) from None
    if failures:
        raise typer.Exit(1)


def _engine(name: str, jobs: int, nni: tuple[Path | None, int | None, int | None], console: Console) -> Engine:
    """The engine that the options name; `nni` are the options of NNI."""
    if name == "nni":
        if jobs > 1:
            raise typer.BadParameter("for --engine nni it is --nni-concurrency", param_hint="--jobs")
        return NniEngine(*nni, announce=lambda url: console.print(f"NNI's web portal: {url}"))
    if name != "local":
        raise typer.BadParameter(f"{name!r} is neither local nor nni", param_hint="--engine")
    if any(option is not None for option in nni):
        raise typer.BadParameter("options of NNI need --engine nni", param_hint="--nni-...")
    return local if jobs == 1 else Processes(jobs)


@app.command("inspect")
def inspect_file(file: CompactFile) -> None:
    """Check a compressed checkpoint and show its contents; the model is not needed."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(inspect(file))


@app.command("bake")
def bake_file(
    file: CompactFile,
    model: Annotated[
        str, Option(help="package.module:function that builds the plain model; it is imported and called.")
    ],
    output: Annotated[
        Path, Option("--output", "-o", help="FILE.safetensors for safetensors, any other name for torch.save.")
    ],
) -> None:
    """Write the state dict of the plain network in a compressed checkpoint: kernels composed, masks applied."""
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
    """The model that the function ``package.module:function`` builds."""
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
