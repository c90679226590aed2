"""Run trial.py as an NNI experiment on this machine: spatial or interspace is one more choice in the search space.

    python examples/nni_experiment/run.py

NNI's web portal is open, on loopback, while it runs. What the trials have reported is written to results.csv and
results.json as they finish; Ctrl-C stops the experiment, and keeps what has finished.
"""

import argparse
import csv
import io
import json
import math
import shlex
import sys
import time
from pathlib import Path

from nni.experiment import ExperimentConfig

from ip_plugin.compare.engines.nni_experiment import portal, running
from ip_plugin.utils.atomic import write_whole

HERE = Path(__file__).parent.resolve()


def configure(args):
    space = json.loads(args.search_space.read_text())
    config = ExperimentConfig("local")
    config.experiment_name = "spatial or interspace"
    config.search_space = space
    config.tuner.name = "GridSearch"
    config.max_trial_number = math.prod(len(choice["_value"]) for choice in space.values())
    config.trial_concurrency = args.concurrency
    config.trial_code_directory = HERE
    epochs = ["--epochs", str(args.epochs), "--finetune-epochs", str(args.finetune_epochs)]
    config.trial_command = shlex.join([sys.executable, "trial.py", *epochs])
    return config


def finished(experiment):
    """What every finished trial has reported.

    Each names its own parameters: those that NNI 3.0 exports are mixed up between trials that start at the same time.
    """
    metrics = experiment.get_job_metrics().values()
    return [{"accuracy": m.data["default"], **m.data} for trial in metrics for m in trial if m.type == "FINAL"]


def export(rows, folder):
    rows = [{name: value for name, value in row.items() if name != "default"} for row in rows]
    write_whole(folder / "results.json", json.dumps(rows, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "results.csv", text.getvalue())


def watch(experiment, folder):
    """Export results as they come; returns whether every trial has succeeded."""
    known = 0
    ended = False
    while not ended:
        status = experiment.get_status()
        ended = status in ("DONE", "ERROR")
        rows = finished(experiment)
        for row in rows[known:]:
            print(f"{row['space']}, {row['criterion']} at {row['sparsity']:g}: {row['accuracy']:.1f} %", flush=True)
        if len(rows) > known:
            export(rows, folder)
            known = len(rows)
        time.sleep(0 if ended else 1)
    failed = [job for job in experiment.list_trial_jobs() if job.status != "SUCCEEDED"]
    for job in failed:
        print(f"trial {job.trialJobId}: {job.status}; the portal has its log", file=sys.stderr)
    return status == "DONE" and not failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search-space", type=Path, default=HERE / "search_space.json")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--finetune-epochs", type=int, default=6)
    parser.add_argument("--concurrency", type=int, default=2, help="trials at once")
    parser.add_argument("--port", type=int, help="of the portal; without it the first free one from 8080")
    parser.add_argument("--output", type=Path, default=Path("nni-experiment"), help="folder for the results")
    parser.add_argument("--stay", action="store_true", help="keep the portal open at the end, until Ctrl-C")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    try:
        with running(configure(args), port=args.port) as experiment:
            print(f"NNI's web portal: {portal(experiment)}", flush=True)
            succeeded = watch(experiment, args.output)
            while args.stay:
                time.sleep(1)
    except KeyboardInterrupt:
        print(f"stopped; what has finished is in {args.output}")
        return 130
    print(f"everything is in {args.output}: results.csv, results.json")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
