"""The command `ip-plugin`."""

from __future__ import annotations

import importlib
import inspect as inspect_module
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from typer import Argument, Option

from . import __version__, bake, load
from .checkpoint import container
from .checkpoint.inspection import inspect
from .compare import config
from .compare import criteria as known_criteria
from .compare.engines import EngineError
from .errors import InterspaceError, StudyError
from .launcher import command as launcher
from .utils.atomic import replacing, write_whole

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


#: Options of ``ip-plugin compare``, and the fields of the schema that they set; all others by ``--set``.
OPTIONS = {
    "criteria": "criteria", "sparsities": "sparsities", "spaces": "spaces", "seeds": "seeds", "data": "data.source",
    "root": "data.root", "train_images": "data.train_images", "model": "model.name", "epochs": "training.epochs",
    "finetune_epochs": "training.finetune_epochs", "lr": "training.lr", "basis_lr": "training.basis_lr",
    "device": "training.device", "threads": "training.threads", "deploy_threads": "measure.deploy_threads",
    "output": "run.output", "engine": "run.engine", "jobs": "run.jobs", "scheduler": "run.scheduler",
    "nni_config": "run.nni_config", "nni_port": "run.nni_port",
}  # fmt: skip


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``**options`` of a command by `OPTIONS`, described as in the schema."""
    own = inspect_module.signature(command, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, field in OPTIONS.items():
        text, default = config.described(field)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        option = Option(help=f"{text[0].upper()}{text[1:]}.", show_default=False if default is None else shown)
        kind = inspect_module.Parameter.KEYWORD_ONLY
        parameters.append(inspect_module.Parameter(name, kind, default=None, annotation=Annotated[str | None, option]))
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@app.command()
@_with_options
def compare(
    study: Annotated[
        Path | None, Argument(help="TOML file that describes the study; options replace its values.")
    ] = None,
    *,
    set_: Annotated[
        list[str], Option("--set", help="Any value of the study, as training.label_smoothing=0.1; can be repeated.")
    ] = [],  # noqa: B006
    tensorboard: Annotated[bool, Option("--tensorboard", help="Write logs for TensorBoard.")] = False,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Also run the cells that failed before.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what would be run, and how long it takes.")] = False,
    write_config: Annotated[
        Path | None, Option(help="Write a commented TOML file with every value, and run nothing.")
    ] = None,
    **options: str | None,
) -> None:
    """Train and prune a network in both spaces, and show which one is more accurate.

    Without options: scikit-learn's digits, two criteria, three sparsities and six seeds, in about two minutes on
    two cores. An interrupted study is resumed by the same command, with any engine.
    """
    if write_config is not None:
        if write_config.exists():
            raise typer.BadParameter(f"there is {str(write_config)!r} already", param_hint="--write-config")
        with _files(write_config):
            write_whole(write_config, config.commented())
        return
    changes: dict[str, Any] = {OPTIONS[name]: value for name, value in options.items() if value is not None}
    changes |= dict(map(config.setting, set_)) | ({"measure.tensorboard": True} if tensorboard else {})
    described = config.read(study, changes)
    from .compare.terminal import run_and_show  # imports pandas, which other commands do without

    command = shlex.join(["ip-plugin", *sys.argv[1:]])
    raise typer.Exit(run_and_show(described, Console(), command, retry_failed=retry_failed, dry_run=dry_run))


@app.command("report")
def report_folders(
    folders: Annotated[list[Path], Argument(help="Folders of results; several are shown as one study.")],
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for the report; by default that of the first results.")
    ] = None,
) -> None:
    """Show the results in folders, and write their report; the data are not needed."""
    from .compare.store import Results
    from .compare.terminal import show

    results = Results.read(*folders)
    results.report(output, shlex.join(["ip-plugin", *sys.argv[1:]]))
    show(results, Console(), output)


@app.command("sensitivity")
def measure_sensitivity(
    study: Annotated[Path | None, Argument(help="TOML file that describes the study, as for compare.")] = None,
    *,
    sparsities: Annotated[
        str, Option(help="Sparsities of the layer that is pruned, comma-separated.")
    ] = "0.5,0.8,0.9,0.95,0.98,0.99",
    totals: Annotated[
        str | None, Option(help="Total sparsities to suggest sparsities of layers for; by default those of the study.")
    ] = None,
    accuracy: Annotated[bool, Option("--accuracy", help="Measure the accuracy instead of the loss.")] = False,
    images: Annotated[int, Option(help="Training images that are measured on.", min=1)] = 1000,
    checkpoint: Annotated[
        Path | None,
        Option(help="Network of the study, trained and written by `ip_plugin.save`, instead of training.", exists=True),
    ] = None,
    set_: Annotated[list[str], Option("--set", help="Any value of the study, as training.epochs=4.")] = [],  # noqa: B006
    output: Annotated[Path, Option("--output", "-o", help="Folder for what is written.")] = Path("ip-sensitivity"),
) -> None:
    """Prune each layer of a study's network alone, in both spaces, and suggest sparsities of layers.

    Trains the dense network in each space, and measures its loss without further training. Writes the measurements
    (sensitivity.csv), their picture, and sparsities that `ip_plugin.methods.prune` takes (suggested.json).
    """
    from .compare import sensitivity  # imports pandas, which other commands do without

    described = config.read(study, dict(map(config.setting, set_))).study()
    # Both are read as the sparsities of a study are: 90 % is 0.9.
    measured = described.changed(sparsities=sparsities).sparsities
    suggested = described.sparsities if totals is None else described.changed(sparsities=totals).sparsities
    with sensitivity.writable(output):
        pass  # a folder that cannot be made is found before anything is trained
    results = sensitivity.sensitivities(
        described, accuracy=accuracy, sparsities=measured, images=images, checkpoint=checkpoint, progress=True
    )
    sensitivity.write(results, suggested, output)
    console = Console()
    console.print(sensitivity.table(results, suggested))
    console.print(f"The picture is {output / 'sensitivity.png'}", highlight=False, soft_wrap=True)


@contextmanager
def _files(path: Path) -> Iterator[None]:
    """Turn the failure to write a file into a message."""
    try:
        yield
    except OSError as error:
        rule, remedy = f"{str(path)!r} must be a file that can be written.", "choose another file"
        raise StudyError(rule, error.strerror or str(error), remedy) from error


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
    console = Console()
    known, broken = known_criteria.survey()
    for name, criterion in known.items():
        table.add_row(name, criterion.title)
    console.print(table)
    for name, reason in broken.items():
        console.print(f"{name}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
