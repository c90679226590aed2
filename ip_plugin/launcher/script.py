"""Run a script, or a module, as Python itself would, while the interspace is switched on."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from ..checkpoint.api import save
from ..errors import ArgumentError, InterspaceError
from ..reporting import report
from ..utils.atomic import write_whole
from .session import Session
from .switch import switch_off, switch_on


def run_script(
    target: str, arguments: list[str], *, is_module: bool, output: Path | None = None, **options: Any
) -> int:
    """Run a script in the interspace; what it prints, its arguments and how it ends are its own.

    Args:
        target: path of a script (or of a folder or archive with a ``__main__.py``), or the name of a module.
        arguments: the script's own.
        is_module: `target` is a module's name, as for ``python -m``.
        output: a folder for ``model.safetensors`` and ``report.json`` of each model at the end.
        **options: of `ip_plugin.switch_on`.

    Returns:
        The exit status.

    Raises:
        ArgumentError: there is no such script.
    """
    if not is_module and not Path(target).exists():
        raise ArgumentError(
            "`ip-plugin run` must be given a script that exists.",
            f"no file {target!r}",
            "ip-plugin run [options] script.py [the script's own arguments], or -m package.module",
        )
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError("--output must be a folder that can be made.", str(error), "choose another") from error
    sys.argv = [target, *arguments]
    sys.path[0] = os.getcwd() if is_module else str(Path(target).resolve().parent)
    session = switch_on(**options)
    try:
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = _status(end)
    except BaseException as error:
        _show(error)
        if isinstance(error, KeyboardInterrupt):
            _end_by_interrupt()
        return 1
    finally:
        switch_off()
    session.finish()
    if output is not None and os.environ.get("RANK", "0") == "0":
        _write(session, output)
    return status


def _status(end: SystemExit) -> int:
    """The status of ``sys.exit(code)``, whose text is printed as Python prints it."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _end_by_interrupt() -> None:
    """End as Python ends after Ctrl-C: exit handlers, streams, and then the signal, which the parent process sees."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _show(error: BaseException) -> None:
    """Print the script's traceback without the frames of the launcher."""
    frame: TracebackType | None = error.__traceback__
    launcher = {__file__, runpy.__file__, "<frozen runpy>"}
    while frame is not None and frame.tb_frame.f_code.co_filename in launcher:
        frame = frame.tb_next
    sys.excepthook(type(error), error.with_traceback(frame), frame)


def _write(session: Session, output: Path) -> None:
    """Write a compressed checkpoint and a report of each model that still exists."""
    for number, model in enumerate(session.models):
        suffix = f"-{number}" if number else ""
        try:
            save(model, output / f"model{suffix}.safetensors")
        except InterspaceError as error:
            session.say(f"not saved: {error}")
        write_whole(output / f"report{suffix}.json", json.dumps(report(model).to_dict(), indent=1))
