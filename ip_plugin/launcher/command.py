"""The command `ip-plugin run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InterspaceError
from .script import run_script

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)  # starts sooner


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(help="A script, or with -m the name of a module.", show_default=False)],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own options and arguments.", show_default=False)
    ] = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module.")] = False,
    basis: Annotated[str, typer.Option(help="standard, orthonormal or dct.")] = "standard",
    sharing: Annotated[str, typer.Option(help="layer (a basis for each) or model (one).")] = "layer",
    constraint: Annotated[str, typer.Option(help="Of the filters of bases: unit, orthonormal or none.")] = "unit",
    space: Annotated[str, typer.Option(help="spatial converts nothing: the control run.")] = "interspace",
    convert_at: Annotated[
        str, typer.Option("--from", help="When layers are converted: start (with the optimizer) or pruning.")
    ] = "start",
    layers: Annotated[str, typer.Option(help="Patterns of names, comma-separated: layer1.*,conv1.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="Folder for a compact checkpoint and a report at the end.", file_okay=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but what the script prints.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run it in both spaces, and show --metric.")] = False,
    metric: Annotated[
        str, typer.Option(help="For --compare: a regular expression with one group, or FILE.json:KEY.")
    ] = r"accuracy\D*([0-9.]+)",
    seed_option: Annotated[
        str | None, typer.Option(help="For --compare: the script's option for its seed, as --seed-option=--seed.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="For --compare with --seed-option: numbers, comma-separated.")] = "0",
) -> None:
    """Run a script that trains and prunes, as it is, in the interspace.

    torch.nn.utils.prune, Torch-Pruning, NNI and Lightning's ModelPruning act on filter coefficients. Lines about what
    was converted and pruned go to the standard error stream. Files of torch.save load into the plain network.

    In a distributed run: torchrun ... -m ip_plugin run SCRIPT
    """
    options = {"basis": basis, "sharing": sharing, "constraint": constraint}
    patterns = [pattern.strip() for pattern in layers.split(",") if pattern.strip()]
    own = list(arguments or ())
    if compare:
        from rich.console import Console  # here, so that a script starts sooner

        from .side_by_side import compare_script

        given = {**options, "from": convert_at, "layers": layers}
        command = [f"--{name}={value}" for name, value in given.items() if value]
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--seeds") from error
        Console().print(
            compare_script([*command, *(["-m"] if module else []), script], own, metric, numbers, seed_option)
        )
        return
    more: dict[str, Any] = {"space": space, "convert_at": convert_at, "layers": patterns, "quiet": quiet}
    raise typer.Exit(run_script(script, own, is_module=module, output=output, **options, **more))


def main(arguments: list[str]) -> None:
    """Run the command; a user's mistake is a message and exit status 2, not a traceback."""
    try:
        app(args=arguments, prog_name="ip-plugin run")
    except InterspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
