"""Criteria by name: ``adapter:criterion`` through the entry points of adapters, or ``module:object``."""

from __future__ import annotations

import inspect
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ip_plugin.adapters import Criterion, hosts
from ip_plugin.errors import StudyError

from . import controls
from .named import blamed, is_named, named

_RULE = "A criterion must be named adapter:criterion, module:object or path/to/file.py:object."


def available() -> dict[str, Criterion]:
    """Every criterion of every adapter that can be imported, by its full name.

    >>> "torch:l1" in available()
    True
    """
    return survey()[0]


def survey() -> tuple[dict[str, Criterion], dict[str, str]]:
    """Every criterion by its full name; and what is wrong, with file and line, by the name of the adapter or criterion.

    An adapter whose pruning library is not installed is left out.
    """
    criteria: dict[str, Criterion] = {}
    broken: dict[str, str] = {}
    for host in sorted(hosts()):
        try:
            offered = _offered(host)
        except ModuleNotFoundError as error:
            if _is_missing(host, error):
                broken[host] = blamed(error)
            continue  # or the adapter is there, and its pruning library is not installed
        except Exception as error:  # code of other people
            broken[host] = blamed(error)
            continue
        for key, criterion in offered.items():
            if isinstance(criterion, Criterion):
                criteria[f"{host}:{key}"] = criterion
            else:
                broken[f"{host}:{key}"] = f"a {type(criterion).__name__} in {hosts()[host].value}, not a Criterion"
    return criteria, broken


def load(name: str) -> Criterion:
    """A criterion by its full name, which may end in a control, see `ip_plugin.compare.controls`.

    An object of a module is a `Criterion`, or a function that is called with (model, count) or with (model, count,
    training) after the training.

    Raises:
        StudyError: there is no such criterion, its pruning library is not installed, or it is of a wrong type.
    """
    plain, control = controls.split(name)
    criterion = _load(plain)
    return controls.controlled(plain, criterion, control) if control else criterion


def _load(name: str) -> Criterion:
    if name == "dense":
        return Criterion.simple("not pruned", "at initialisation", lambda model, count: None)  # noqa: ARG005
    host, _, key = name.partition(":")
    if host not in hosts():
        if not is_named(name) or _is_nowhere(host):
            raise StudyError(_RULE, f"{name!r}", f"use one of {', '.join(available())}")
        return _criterion(name, named(name, "criterion"))
    try:
        offered = _offered(host)
    except ImportError as error:
        raise StudyError(
            _RULE, f"{name!r}: {blamed(error)}", f"install the pruning library of the adapter {host!r}"
        ) from error
    except Exception as error:  # code of other people
        raise StudyError(_RULE, f"{name!r}: {blamed(error)}", f"correct the adapter {host!r}") from error
    if key not in offered:
        known = [f"{host}:{other}" for other in offered]
        raise StudyError(_RULE, f"{name!r}", f"use one of {', '.join(known) or ', '.join(available())}")
    criterion = offered[key]
    if not isinstance(criterion, Criterion):
        raise _wrong(name, criterion)
    return criterion


def _is_nowhere(module: str) -> bool:
    """Whether there is no module of this name, installed or in the working folder; of a file `named` tells."""
    first = module.partition(".")[0]
    return not (module.endswith(".py") or find_spec(first) or Path(f"{first}.py").exists() or Path(first).is_dir())


def _criterion(name: str, thing: Any) -> Criterion:
    """An object of a module as a criterion."""
    if isinstance(thing, Criterion):
        return thing
    if not callable(thing):
        raise _wrong(name, thing)
    try:
        arguments = len(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        arguments = 0
    title = ((inspect.getdoc(thing) or name).splitlines() or [name])[0].rstrip(".")
    if arguments == 3:
        return Criterion(title, "after training", thing)
    if arguments == 2:
        return Criterion.simple(title, "after training", thing)
    raise _wrong(name, thing)


def _wrong(name: str, thing: Any) -> StudyError:
    """The error for an object that is no criterion."""
    where = ""
    with suppress(TypeError, OSError):
        where = f" ({inspect.getsourcefile(thing)}, line {inspect.getsourcelines(thing)[1]})"
    rule = "A criterion must be a Criterion of ip_plugin.adapters, or a function of (model, count[, training])."
    return StudyError(rule, f"{name!r} is a {type(thing).__name__}{where}", "correct it, or name another object")


def _is_missing(host: str, error: ModuleNotFoundError) -> bool:
    """Whether it is the adapter's own module that is not there, and not the pruning library that it needs."""
    return error.name is not None and hosts()[host].value.partition(":")[0].startswith(error.name)


def _offered(host: str) -> dict[str, Any]:
    criteria: dict[str, Any] = getattr(hosts()[host].load(), "CRITERIA", {})
    if not isinstance(criteria, dict):
        rule = f"CRITERIA of the adapter {host!r} must be a dict."
        raise StudyError(rule, f"a {type(criteria).__name__} in {hosts()[host].value}", "make it {name: Criterion}")
    return criteria
