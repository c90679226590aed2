"""Memory, preparation and first call of sparse networks, each in a process of its own.

    python benchmarks/sparse_footprint.py

The networks of `sparse_networks.py` at 95 %, one threshold. Memory is what calls add to a process at most (weights,
activations, workspaces), measured by the operating system (Linux) after the model that was prepared is gone; the dense
network likewise. Preparation is timed twice: without and with compiled loops on disk.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sparse_networks import CASES, network

from ip_plugin.sparse import prepare


def resident(what: str) -> int:
    """Kilobytes of this process: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what)))


def trim() -> None:
    """Give freed memory back, and forget how much there was."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, batch: int, space: str) -> dict[str, float]:
    """What one network takes: megabytes and seconds; the second of its kind, so that code is not counted."""
    found = {}
    for _ in range(2):
        trim()
        before = resident("VmRSS")
        model, images = network(name, space, 0.95)
        example = images(batch)
        began = time.perf_counter()
        run = model if space == "dense" else prepare(model, example)
        found["prepared"] = time.perf_counter() - began
        del model
        trim()
        began = time.perf_counter()
        with torch.no_grad():
            run(example)
            found["first"] = time.perf_counter() - began
            for _ in range(3):
                run(example)
        found["megabytes"] = (resident("VmHWM") - before) / 1024
        del run
    return found


def first_use(name: str, batch: int) -> float:
    """Seconds of a preparation in a process that has no compiled loop."""
    model, images = network(name, "IP", 0.95)
    example = images(batch)
    began = time.perf_counter()
    prepare(model, example)
    return time.perf_counter() - began


def child(*arguments: object, cache: str) -> dict[str, float]:
    """Measure in another process."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=3, metavar=("NAME", "BATCH", "SPACE"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        name, batch, space = arguments.child
        if space == "first":
            print(json.dumps({"prepared": first_use(name, int(batch))}))
        else:
            print(json.dumps(measure(name, int(batch), space)))
        return
    print(f"torch {torch.__version__}, {arguments.threads} threads\n")
    for name, batch in CASES:
        with tempfile.TemporaryDirectory() as cache:
            compiling = child(name, batch, "first", cache=cache)["prepared"]
            dense = child(name, batch, "dense", cache=cache)
            print(f"{name}, batch {batch}: dense {dense['megabytes']:.0f} MB")
            for space in ("SP", "IP"):
                found = child(name, batch, space, cache=cache)
                print(
                    f"  {space}: {found['megabytes']:.0f} MB, {found['megabytes'] / dense['megabytes']:.2f} of dense; "
                    f"prepared in {found['prepared']:.1f} s, first call after it {1000 * found['first']:.1f} ms"
                )
            print(f"  IP, prepared in {compiling:.1f} s where the loops are compiled first", flush=True)


if __name__ == "__main__":
    main()
