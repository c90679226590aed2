"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import ip_plugin
import ip_plugin.adapters


def modules() -> list[str]:
    found = [f"ip_plugin.{info.name}" for info in pkgutil.iter_modules(ip_plugin.__path__) if info.name != "adapters"]
    for package in ("adapters", "compare", "methods"):
        path = importlib.import_module(f"ip_plugin.{package}").__path__
        found += [f"ip_plugin.{package}.{info.name}" for info in pkgutil.iter_modules(path)]
    return ["ip_plugin", "ip_plugin.adapters", *sorted(set(found))]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.failed == 0


def test_the_main_verbs_have_examples() -> None:
    finder = doctest.DocTestFinder()
    without = [name for name in ip_plugin.__all__ if name not in ("errors", "Report")]
    without = [name for name in without if not any(t.examples for t in finder.find(getattr(ip_plugin, name), name))]
    assert without == []
