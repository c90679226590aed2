"""Criteria by their full name, ``adapter:criterion``, found through the entry points of the adapters."""

from __future__ import annotations

import traceback
from importlib import import_module
from importlib.util import find_spec
from typing import cast

from ip_plugin.adapters import Criterion, hosts
from ip_plugin.errors import StudyError


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
            offered = {f"{host}:{name}": criterion for name, criterion in _offered(host).items()}
        except ModuleNotFoundError:  # the adapter is there, its pruning library is not installed
            continue
        except Exception as error:  # code of other people
            last = traceback.extract_tb(error.__traceback__)[-1]
            broken[host] = f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
            continue
        for name, criterion in offered.items():
            if isinstance(criterion, Criterion):
                criteria[name] = criterion
            else:
                broken[name] = f"a {type(criterion).__name__} in {hosts()[host].value}, not a Criterion"
    return criteria, broken


def load(name: str) -> Criterion:
    """A criterion by its full name.

    Raises:
        StudyError: there is no such criterion, or its pruning library is not installed.
    """
    host, _, criterion = name.partition(":")
    if host not in hosts() and find_spec(host.partition(".")[0]):
        try:
            return cast("Criterion", getattr(import_module(host), criterion))
        except (ImportError, AttributeError) as error:
            raise StudyError("A criterion must be there.", f"{name!r}: {error}", "use module:object") from error
    if name == "dense":
        return Criterion.simple("not pruned", "at initialisation", lambda model, count: None)  # noqa: ARG005
    rule = "A criterion must be named adapter:criterion."
    try:
        offered = _offered(host) if host in hosts() else {}
    except ImportError as error:
        raise StudyError(rule, f"{name!r}: {error}", f"install the pruning library of the adapter {host!r}") from error
    if criterion in offered:
        return offered[criterion]
    raise StudyError(rule, f"{name!r}", f"use one of {', '.join(available())}")


def _offered(host: str) -> dict[str, Criterion]:
    criteria: dict[str, Criterion] = getattr(hosts()[host].load(), "CRITERIA", {})
    return criteria
