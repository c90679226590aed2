"""The command `ip-plugin run`.

By argparse, as `torchrun`: a script shall start as soon as it does alone, and typer takes 0.2 s to import.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from ..basis.bases import CONSTRAINTS
from ..errors import InterspaceError
from .script import run_script

DESCRIPTION = """\
Run a script that trains and prunes, as it is, in the interspace.

torch.nn.utils.prune, Torch-Pruning, NNI and Lightning's ModelPruning act on filter coefficients. Lines about what
was converted and pruned go to the standard error stream. Files of torch.save load into the plain network.

In a distributed run: torchrun ... -m ip_plugin run SCRIPT
"""


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    command = argparse.ArgumentParser(
        "ip-plugin run",
        usage="%(prog)s [options] SCRIPT [script's own options and arguments]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = command.add_argument
    option("-m", "--module", action="store_true", help="SCRIPT is the name of a module")
    option("--basis", choices=("standard", "orthonormal", "dct"), default="standard", help="initial filter bases")
    option("--sharing", choices=("layer", "model"), default="layer", help="a basis for each layer, or one for all")
    option("--constraint", choices=CONSTRAINTS, default="unit", help="of the filters of bases")
    option("--space", choices=("interspace", "spatial"), default="interspace", help="spatial: the control run")
    option("--from", dest="convert_at", choices=("start", "pruning"), default="start", help="when layers are converted")
    option("--layers", type=_names, default=[], help="patterns of layers' names, comma-separated: layer1.*,conv1")
    option("--output", type=Path, metavar="FOLDER", help="for a compact checkpoint and a report at the end")
    option("--quiet", action="store_true", help="print nothing but what the script prints")
    option("--compare", action="store_true", help="run it in both spaces, and show --metric")
    option(
        "--metric",
        default=r"accuracy\D*([0-9.]+)",
        help="for --compare: a regular expression with one group, or FILE.json:KEY",
    )
    option("--seed-option", help="for --compare: the script's option for its seed, as --seed-option=--seed")
    option("--seeds", type=_seeds, default=[0], help="for --compare with --seed-option: numbers, comma-separated")
    option("script", metavar="SCRIPT", help="a script, or with -m the name of a module")
    option("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return command


def main(arguments: list[str]) -> NoReturn:
    """Run the command; a user's mistake is a message and exit status 2, not a traceback."""
    options = vars(parser().parse_args(arguments))
    script, own, output = (options.pop(name) for name in ("script", "arguments", "output"))
    compare, metric, seeds, seed_option = (options.pop(name) for name in ("compare", "metric", "seeds", "seed_option"))
    is_module = options.pop("module")
    try:
        if not compare:
            sys.exit(run_script(script, own, is_module=is_module, output=output, **options))
        from rich.console import Console  # here, so that a script starts sooner

        from .side_by_side import compare_script

        given = {**options, "from": options["convert_at"], "layers": ",".join(options["layers"])}
        command = [f"--{name}={given[name]}" for name in ("basis", "sharing", "constraint", "from", "layers")]
        table = compare_script([*command, *(["-m"] if is_module else []), script], own, metric, seeds, seed_option)
        Console().print(table)
    except InterspaceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit()
