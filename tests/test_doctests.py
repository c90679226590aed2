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
    names = ["ip_plugin", "ip_plugin.adapters"]
    for package in (ip_plugin, ip_plugin.adapters):
        names += [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return sorted({name for name in names if not name.endswith("__main__")})


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
