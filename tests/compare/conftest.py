from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ip_plugin import cli


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """What the command says when it ends with status 2, on one line without borders; it is run in `tmp_path`."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ip-plugin", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run()
        assert ended.value.code == 2, arguments
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run
