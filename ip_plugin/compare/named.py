"""Objects of other people's code by name: ``package.module:object``, or ``path/to/file.py:object``."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from ip_plugin.errors import StudyError, listed


def is_named(text: str) -> bool:
    """Whether a text names an object of a module or file.

    >>> is_named("my_package.data:load"), is_named("CIFAR10"), is_named("data/images.npz")
    (True, False, False)
    """
    module, colon, name = text.rpartition(":")
    return bool(colon and module) and name.isidentifier()


def named(text: str, what: str) -> Any:
    """The object that a text names; its module is imported from where ``python -m`` would find it, or from its file.

    Args:
        text: ``package.module:object`` or ``path/to/file.py:object``.
        what: which part of a study it is, for messages.

    Raises:
        StudyError: there is no such module or object, or the module cannot be imported.

    >>> named("math:sqrt", "function")(4.0)
    2.0
    """
    module, _, name = text.rpartition(":")
    rule = f"The {what} must be the name of an object, module:object or path/to/file.py:object."
    path = Path(module)
    if path.suffix == ".py":
        if not path.is_file():
            raise StudyError(rule, f"{text!r}: no file {module!r} in {str(Path.cwd())!r}", "correct the path")
        folder, module = str(path.resolve().parent), path.stem
    else:
        folder = ""
    if folder not in sys.path:  # the working folder before installed modules, as Python has it; others after them
        sys.path.insert(len(sys.path) if folder else 0, folder)
    try:
        loaded = import_module(module)
    except Exception as error:  # code of other people
        raise StudyError(rule, f"{text!r}: {blamed(error)}", "correct the name or the module") from error
    if folder and Path(str(loaded.__file__)).resolve() != path.resolve():
        found = f"{text!r}: Python knows another module of this name, {loaded.__file__}"
        raise StudyError(rule, found, "rename the file")
    if not hasattr(loaded, name):
        names = [known for known in vars(loaded) if not known.startswith("_")]
        raise StudyError(rule, f"{text!r}: {module} has no {name!r}", f"use one of {listed(names, 12)}")
    return getattr(loaded, name)


def blamed(error: BaseException) -> str:
    """An error with the file and line of other people's code where it arose, in words."""
    return f"{type(error).__name__}: {error}{place(error)}"


def place(error: BaseException) -> str:
    """File and line where an error arose, in brackets."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""


def called(text: str, what: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """What other people's function returns.

    Raises:
        StudyError: it raises an error; the message has its file and line.
    """
    try:
        return function(*arguments, **options)
    except StudyError:
        raise
    except Exception as error:
        rule = f"The {what} {text!r} must run without an error."
        raise StudyError(rule, blamed(error), "correct it; the traceback is in the record of the run") from error
