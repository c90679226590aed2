"""The cost of deploying a pruned network: bytes of its compressed checkpoint, and latency on a CPU."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ip_plugin import save
from ip_plugin.checkpoint import container
from ip_plugin.errors import StudyError
from ip_plugin.utils.timing import side_by_side

#: Timed calls of each network, and calls before them that are not timed.
ROUNDS, WARMUP = 200, 20


def saved(model: nn.Module) -> bytes:
    """The file that `ip_plugin.save` writes of a network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save(model, path)
        return path.read_bytes()


def stored(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of tensors."""
    values = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(container.safetensors().torch.save(values))


def latencies(model: nn.Module, dense: nn.Module, image: Tensor, threads: int) -> dict[str, float]:
    """Prepare a pruned network, and time it side by side with a dense one.

    Args:
        model: a pruned network in either space; as the other one in evaluation mode, and moved to the CPU.
        dense: the network that was not pruned.
        image: a batch of one, ``(1, channels, height, width)``.
        threads: number of threads with which both run; torch's own number is restored afterwards.

    Returns:
        ``latency_ms``: median time of a call with one image, in milliseconds, of the network that
        `ip_plugin.sparse.prepare` makes of it. ``dense_latency_ms``: that of the network before pruning, run by torch;
        calls of the two alternate.

    Raises:
        StudyError: numba is not installed, or has fewer threads.
    """
    check_threads(threads)
    from ip_plugin.sparse import prepare

    image = image.cpu()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = {
            "latency_ms": partial(prepare(model.cpu(), image), image),
            "dense_latency_ms": partial(dense.cpu(), image),
        }
        with torch.inference_mode():
            times = side_by_side(calls, rounds=ROUNDS, warmup=WARMUP)
    finally:
        torch.set_num_threads(before)
    return {name: round(1000 * statistics.median(times[name]), 5) for name in calls}


def check_threads(threads: int) -> None:
    """Raise StudyError unless latencies can be measured here: numba is installed, and has so many threads."""
    try:
        import ip_plugin.sparse  # noqa: F401
    except ImportError as error:
        rule, remedy = "To measure latencies, numba must be installed.", "run: pip install 'ip-plugin[sparse]'"
        raise StudyError(rule, str(error.__cause__ or error), remedy) from error
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if not 1 <= threads <= most:
        rule = f"`deploy_threads` must be a number from 1 to {most}, the threads that numba has here."
        raise StudyError(rule, f"{threads}", "change deploy-threads, or the variable NUMBA_NUM_THREADS")
