"""Start an NNI experiment, and leave nothing of it behind.

NNI 3.0 is imported when it is used. Its manager has two habits that are corrected here:

- It listens on every network interface, without a password, and runs commands for whoever asks. With the local training
  service it is bound to loopback. Other training services need to reach it, so there it stays as it is.
- It outlives the process that started it. Here it ends with that process, even if that is killed, and its trials too.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import EngineError

FIRST_PORT = 8080
_STARTS_TRIED = 3

_PRELOAD = """\
delete process.env.NODE_OPTIONS;
const server = require('net').Server.prototype, listen = server.listen, host = %s, parent = process.ppid;
if (host) server.listen = function (port, ...rest) {
  return listen.call(this, port, ...(typeof port === 'number' ? [host] : []), ...rest);
};
const alone = () => process.ppid !== parent;
setInterval(() => { if (alone()) process.kill(process.pid, 'SIGTERM'); }, 500).unref();
process.on('exit', () => { if (alone()) require('fs').rmSync(__dirname, {recursive: true, force: true}); });
"""


@contextmanager
def running(config: Any, *, port: int | None = None) -> Iterator[Any]:
    """Run an NNI experiment while the block runs; no process of it is left behind, however the block ends.

    Its working directory is temporary, unless the configuration names one.

    Args:
        config: an `nni.experiment.ExperimentConfig`.
        port: of the web portal; None is the first free one from 8080.

    Yields:
        The `nni.experiment.Experiment`.

    Raises:
        EngineError: NNI could not start, or `port` is in use.
    """
    import nni
    from nni.experiment import Experiment
    from nni.experiment.config import ExperimentConfig
    from nni.tools.nnictl.config_utils import Experiments

    local = getattr(config.training_service, "platform", None) == "local"
    kept = config.experiment_working_directory != ExperimentConfig.experiment_working_directory
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost,127.0.0.1"]))
    wait_policy = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow other trials down
    nni.silence_stdout()
    with (
        tempfile.TemporaryDirectory(prefix="ip-plugin-nni-", ignore_cleanup_errors=True) as folder,
        _environment(no_proxy=direct, NO_PROXY=direct, OMP_WAIT_POLICY=wait_policy),
    ):
        preload = Path(folder, "preload.cjs")
        preload.write_text(_PRELOAD % json.dumps("127.0.0.1" if local else None), encoding="utf-8")
        if not kept:
            config.experiment_working_directory = folder
        experiment = Experiment(config)
        experiment.url_prefix = secrets.token_hex(8)  # so that no request meant for one manager reaches another
        try:
            _start(experiment, port, preload)
            yield experiment
        finally:
            try:
                _stop(experiment)
            finally:
                if not kept:
                    Experiments().remove_experiment(experiment.id)


def portal(experiment: Any) -> str:
    """The address of a running experiment's web portal."""
    return f"http://127.0.0.1:{experiment.port}/{experiment.url_prefix}/"


def request(experiment: Any, path: str) -> bytes:
    """What the manager of a running experiment answers to a request of its REST interface."""
    with urllib.request.urlopen(f"{portal(experiment)}api/v1/nni/{path}", timeout=20) as answer:
        return bytes(answer.read())


def _start(experiment: Any, port: int | None, preload: Path) -> None:
    """Start the manager on the port, or on the first one that is free."""
    ports = range(FIRST_PORT, FIRST_PORT + 100) if port is None else [port] * _STARTS_TRIED
    failures: list[Exception] = []
    for candidate in ports:
        if not _is_free(candidate):
            if port is None:
                continue
            raise EngineError(
                f"Port {port} for NNI's web portal is in use by another process. Choose another one with --nni-port, "
                "or leave it out to take the first free one."
            )
        options = f"{os.environ.get('NODE_OPTIONS', '')} --require {json.dumps(str(preload))}".strip()
        try:
            with _environment(NODE_OPTIONS=options), interrupts_delayed():
                experiment.start(candidate)
        except (RuntimeError, OSError) as error:  # another process took the port, or the manager is too slow
            failures.append(error)
            if len(failures) == _STARTS_TRIED:
                break
        else:
            return
    reason = f"{type(failures[-1]).__name__}: {failures[-1]}" if failures else f"no free port in {ports}"
    raise EngineError(f"The NNI experiment did not start: {reason}")


def _stop(experiment: Any) -> None:
    """Stop the manager and its trials: first by NNI itself, then by killing what remains of their process group."""
    process = experiment._proc
    try:
        experiment.stop()
    finally:
        if process is not None:
            if hasattr(os, "killpg"):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables, for this process and those that it starts, while the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block: interrupted while it starts a manager, NNI would forget that process."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt
