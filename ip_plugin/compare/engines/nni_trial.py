"""One cell of a study as a trial of an NNI experiment: ``python -m ip_plugin.compare.engines.nni_trial``.

NNI starts it in a folder with the ``study.json`` that `ip_plugin.compare.engines.nni` has written there. Every report
names the cell: NNI 3.0 shows trials that start at the same time under each other's parameters. Its portal draws
``default``: the accuracy, after each epoch on the validation images or without any on the training images, and at the
end on the test images.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from ..config import Cell
from ..record import Epoch
from . import attempt_elsewhere

STUDY = "study.json"


def main() -> None:
    """Take a cell from NNI, run it, and report every epoch and the record."""
    import nni

    cell = Cell(**nni.get_next_parameter())
    nni.report_intermediate_result({"default": 0.0, **cell._asdict()})

    def on_epoch(epoch: Epoch) -> None:
        accuracy = epoch.train_accuracy if epoch.accuracy is None else epoch.accuracy
        nni.report_intermediate_result({"default": accuracy, "epoch": vars(epoch), **cell._asdict()})

    given = json.loads(Path(STUDY).read_text(encoding="utf-8"))
    sys.path += given["path"]
    with suppress(OSError):  # on another machine it may not be there
        os.chdir(given["folder"])  # paths of the study are relative to it
    record = attempt_elsewhere(cell, given["study"], given["versions"], on_epoch)
    accuracy = 0.0 if record.result is None else record.result.accuracy
    nni.report_final_result({"default": accuracy, "record": record.to_json(), **cell._asdict()})
    if record.traceback is not None:
        sys.exit(record.traceback)


if __name__ == "__main__":
    main()
