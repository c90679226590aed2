"""One cell of a study as a trial of an NNI experiment: ``python -m ip_plugin.compare.engines.nni_trial``.

NNI starts it in a folder with the ``settings.json`` that `ip_plugin.compare.engines.nni` has written there. Every
report names the cell: NNI 3.0 shows trials that start at the same time under each other's parameters.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import torch

from ip_plugin.errors import StudyError

from ..cell import execute
from ..config import Cell, Settings
from ..store import to_row, versions

SETTINGS = "settings.json"


def main() -> None:
    """Take a cell from NNI, run it, and report every epoch and the result, or the error."""
    import nni

    cell = Cell(**nni.get_next_parameter())
    epochs = count()

    def report(**more: object) -> None:
        nni.report_intermediate_result({"default": next(epochs), **cell._asdict(), **more})

    report()
    try:
        given = json.loads(Path(SETTINGS).read_text(encoding="utf-8"))
        if versions() != given["versions"]:
            rule, found = (
                "A trial must have the versions of the study.",
                f"{versions()} here, {given['versions']} there",
            )
            raise StudyError(rule, found, "install the same versions on every machine")
        torch.set_num_threads(given["threads"])
        result = execute(cell, Settings(**given["settings"]), report)
    except Exception as error:
        report(error=f"{type(error).__name__}: {error}")
        raise
    nni.report_final_result({"default": result.accuracy, **to_row(result)})


if __name__ == "__main__":
    main()
