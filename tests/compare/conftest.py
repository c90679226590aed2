from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from records import SMALL

from ip_plugin import cli
from ip_plugin.compare import Results, run


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


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of `SMALL`, run in this process."""
    return run(SMALL, tmp_path_factory.mktemp("reference"), jobs=1)
