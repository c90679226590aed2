"""One cell of a study's grid as a trial of an NNI experiment: ``python -m ip_plugin.compare.engines.nni_trial``.

NNI starts it, in a folder with the ``settings.json`` that `ip_plugin.compare.engines.nni` has written there. Everything
that it reports names its cell: NNI 3.0 shows trials that start at the same time under each other's parameters.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch

from ip_plugin.errors import InvalidStudyError

from ..cell import execute
from ..config import Run, Settings
from ..store import versions

SETTINGS = "settings.json"


def main() -> None:
    """Take a cell from NNI, run it, and report every epoch and the result; or the error, and end with it."""
    import nni

    run = Run(**nni.get_next_parameter())
    epochs = count()

    def report(**more: object) -> None:
        nni.report_intermediate_result({"default": next(epochs), **run._asdict(), **more})

    report()
    try:
        given = json.loads(Path(SETTINGS).read_text(encoding="utf-8"))
        if versions() != given["versions"]:
            raise InvalidStudyError(
                "A trial must have the versions of the study.",
                f"{versions()} here, {given['versions']} there",
                "install the same versions on every machine",
            )
        torch.set_num_threads(given["threads"])
        result = asdict(execute(run, Settings(**given["settings"]), report))
    except Exception as error:
        report(error=f"{type(error).__name__}: {error}")
        raise
    del result["run"]
    nni.report_final_result({"default": result["accuracy"], **run._asdict(), **result})


if __name__ == "__main__":
    main()
