"""The smallest comparison: a script without and with the interspace, its metric side by side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table

from ..errors import ArgumentError, StudyError

SPACES = ("spatial", "interspace")


def read_metric(text: str, metric: str) -> float:
    r"""The metric in what a script has printed, or in a JSON file.

    Args:
        text: what was printed.
        metric: a regular expression whose only group is the number (the last match counts), or ``FILE.json:KEY``,
            where the key may go deeper by dots.

    >>> read_metric("epoch 1: accuracy 0.5\nepoch 2: accuracy 0.75", r"accuracy ([0-9.]+)")
    0.75
    """
    try:
        path, _, key = metric.rpartition(":")
        if path.endswith(".json"):
            value = json.loads(Path(path).read_text())
            for part in key.split("."):
                value = value[part]
            return float(value)
        matches = re.findall(metric, text)
        found = f"{len(matches)} matches of {metric!r} in {len(text.splitlines())} lines of output"
        if matches:
            return float(matches[-1])
    except (OSError, ValueError, LookupError, TypeError, re.error) as error:
        found = f"{metric!r}: {type(error).__name__}: {error}"
    raise StudyError(
        "The script must give its metric: a number that an expression with one group finds, or that a JSON file has.",
        found,
        r"pass for example --metric 'accuracy: ([0-9.]+)', or --metric results.json:accuracy",
    )


def compare_script(
    command: Sequence[str], arguments: Sequence[str], metric: str, seeds: Sequence[int], seed_option: str | None
) -> Table:
    """Run a script spatial and switched, with each seed, and show its metric side by side.

    Args:
        command: options of ``ip-plugin run`` and the script.
        arguments: the script's own.
        metric: see `read_metric`.
        seeds: one run in each space for each.
        seed_option: the script's option that takes the seed; None if it has none.

    Raises:
        ArgumentError: several seeds, and no option that takes them.
        StudyError: a run failed, or did not give the metric.
    """
    if len(seeds) > 1 and find_spec("scipy") is None:
        raise ArgumentError(
            "Several seeds need scipy, for the interval of their difference.",
            "scipy is not installed",
            "pip install 'ip-plugin[compare]', or compare with one seed",
        )
    if len(seeds) > 1 and seed_option is None:
        raise ArgumentError(
            "Several seeds need an option of the script that takes them.",
            f"{len(seeds)} seeds",
            "pass --seed-option with the name of that option, for example --seed-option=--seed",
        )
    found: dict[str, list[float]] = {space: [] for space in SPACES}
    for seed in seeds:
        for space in SPACES:
            seeded = [] if seed_option is None else [seed_option, str(seed)]
            call = [sys.executable, "-m", "ip_plugin", "run", "--space", space, *command, *arguments, *seeded]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise StudyError(
                    "The script must end with status 0 in both spaces.",
                    f"status {done.returncode} in the {space} run:\n{done.stderr.strip()[-2000:]}",
                    "run it by itself until it works: " + " ".join(call),
                )
            found[space].append(read_metric(done.stdout, metric))
    return _table(found, seeds)


def _table(found: dict[str, list[float]], seeds: Sequence[int]) -> Table:
    table = Table("seed", "spatial", "interspace", "difference")
    differences = [new - old for old, new in zip(found["spatial"], found["interspace"], strict=True)]
    for row in zip(map(str, seeds), found["spatial"], found["interspace"], differences, strict=True):
        table.add_row(row[0], f"{row[1]:g}", f"{row[2]:g}", f"{row[3]:+.4g}")
    count = len(differences)
    mean = [sum(values) / count for values in (found["spatial"], found["interspace"], differences)]
    if count > 1:
        from scipy import stats

        interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
        caption = f"{mean[2]:+.4g}, 95 % interval [{interval.low:+.4g}, {interval.high:+.4g}] over {count} seeds"
        table.add_section()
        table.add_row("mean", f"{mean[0]:.6g}", f"{mean[1]:.6g}", caption)
    else:
        table.caption = "one seed: nothing can be said about chance"
    return table
