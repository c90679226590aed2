"""Criteria by name: ``host:criterion``, found through the entry points of the adapters."""

from __future__ import annotations

from typing import get_args

from ip_plugin.adapters import AnyCriterion, hosts
from ip_plugin.errors import InvalidStudyError


def available() -> dict[str, AnyCriterion]:
    """Every criterion of every host that can be imported, by its full name.

    >>> "torch:l1" in available()
    True
    """
    found: dict[str, AnyCriterion] = {}
    for host, entry in sorted(hosts().items()):
        try:
            criteria = getattr(entry.load(), "CRITERIA", {})
        except ImportError:
            continue  # the adapter is here, its host is not installed
        found |= {f"{host}:{name}": criterion for name, criterion in criteria.items()}
    return found


def load(name: str) -> AnyCriterion:
    """A criterion by its full name.

    Raises:
        InvalidStudyError: no such criterion, or its host is not installed.
    """
    host, _, criterion = name.partition(":")
    rule = "A criterion must be named host:criterion."
    if host in hosts():
        try:
            found = getattr(hosts()[host].load(), "CRITERIA", {}).get(criterion)
        except ImportError as error:
            raise InvalidStudyError(rule, f"{name!r}: {error}", f"install the host {host!r}") from error
        if found is not None:
            assert isinstance(found, get_args(AnyCriterion))
            return found  # type: ignore[no-any-return]
    raise InvalidStudyError(rule, f"{name!r}", f"use one of {', '.join(available())}")
