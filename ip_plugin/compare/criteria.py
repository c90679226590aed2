"""Criteria by their full name, ``adapter:criterion``, found through the entry points of the adapters."""

from __future__ import annotations

from contextlib import suppress
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
    criteria: dict[str, Criterion] = {}
    for host in sorted(hosts()):
        with suppress(ImportError):  # the adapter is there, its pruning library is not installed
            criteria |= {f"{host}:{name}": criterion for name, criterion in _offered(host).items()}
    return criteria


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
