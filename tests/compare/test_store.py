"""Results on disk: what a folder holds, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from records import SMALL, made_up

from ip_plugin.compare import Cell, Record, Results, Study, store
from ip_plugin.compare.record import versions
from ip_plugin.errors import StudyError

CELL = Cell("torch:l1", 0.9, "interspace", 0)
ROOT = Path(__file__).parents[2]


def filled(folder: Path, study: Study = SMALL, *more: Record) -> Results:
    """A folder with a record of every cell, and others."""
    with Results.open(folder, study) as results:
        for record in (*map(made_up, study.cells()), *more):
            results.add(record)
    return results


def test_records_are_read_back_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    odd = made_up(CELL, 1 / 3)
    assert odd.result is not None
    odd = replace(odd, result=replace(odd.result, spatial_layers=("a", "b"), accuracy_before_pruning=0.1))
    failed = Record(CELL._replace(seed=1), traceback="Traceback\nValueError: x")
    with Results.open(folder, SMALL) as results:
        results.add(replace(odd, files={"masks.safetensors": b"123"}))
        results.add(failed)
    with Results.open(folder, SMALL) as again:
        assert again.records == {CELL: odd, failed.cell: failed}
    assert Results.read(folder).records == again.records
    assert again.failures == {failed.cell: failed.traceback}
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "cells", "files", "results.csv", "study.json"]
    assert [path.read_bytes() for path in folder.glob("files/*/masks.safetensors")] == [b"123"]


def test_the_frames_are_tidy_and_results_csv_is_one_of_them(tmp_path: Path) -> None:
    results = filled(tmp_path)
    frame = results.frame()
    assert [Cell(*row) for row in frame[list(Cell._fields)].itertuples(index=False)] == SMALL.cells()
    written = pd.read_csv(tmp_path / "results.csv", keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(written.fillna({"spatial_layers": ""}), frame, check_dtype=False)
    assert list(frame) == list(store.COLUMNS)
    curves, density = results.curves(), results.density()
    assert len(curves) == 2 * len(frame) and list(curves["accuracy"][:2].fillna(-1)) == [-1.0, 70.0]
    assert set(curves["phase"]) == {"train", "finetune"}
    assert len(density) == len(frame) and set(density["density"]) == {0.25}
    assert results.bases()[CELL] == {"0": [[1.0, 0.0], [0.0, 1.0]]}


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other files": (lambda f: (f / "thesis.tex").write_text("x"), "no study.json, but thesis.tex"),
    "other settings": (
        lambda f: filled(f, SMALL.changed({"training.epochs": 3})),
        "training.epochs is 3 there and 1 here",
    ),
    "other threads": (
        lambda f: filled(f, SMALL.changed({"training.threads": 2})),
        "training.threads is 2 there and 1 here",
    ),
    "other versions": (
        lambda f: (f / "study.json").write_text(
            json.dumps({"study": SMALL.model_dump(mode="json"), "versions": {"torch": "1.0"}})
        ),
        "versions.torch is '1.0' there",
    ),
    "a broken study.json": (lambda f: (f / "study.json").write_text("{"), "study.json that cannot be read"),
    "a list": (lambda f: (f / "study.json").write_text("[]"), "study.json that cannot be read"),
    "a broken record": (
        lambda f: (filled(f), (f / "cells" / "x.json").write_text('{"cell": {}}')),
        "x.json, which cannot be read",
    ),
    "results of an older version": (
        lambda f: shutil.copytree(ROOT / "benchmarks" / "results" / "digits", f, dirs_exist_ok=True),
        "spaces|there and",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_something_else_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    make, text = FOREIGN[name]
    make(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(StudyError, match=text) as caught, Results.open(tmp_path, SMALL):
        pass
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert "remove" not in str(caught.value)


def test_a_folder_in_use_is_refused_whatever_it_holds(tmp_path: Path) -> None:
    filled(tmp_path)
    with FileLock(tmp_path / ".lock"):
        for study in (SMALL, SMALL.changed({"training.epochs": 3})):
            with pytest.raises(StudyError, match="another process .*\n.*wait for it") as caught:
                with Results.open(tmp_path, study):
                    pass
            assert "remove" not in str(caught.value)


def test_what_cannot_be_written_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for folder, reason in ((tmp_path / "file", "Not a directory"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(StudyError, match=f"can be written to.\nFound: {reason}"), Results.open(folder, SMALL):
            pass
    with Results.open(tmp_path / "full", SMALL) as results:
        results.add(made_up(CELL))

        def full(path: Path, content: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(store, "write_whole", full)
        with pytest.raises(StudyError, match="No space left on device\nWhat to do: make room"):
            results.add(made_up(CELL._replace(seed=1)))
    assert list(Results.read(tmp_path / "full").records) == [CELL]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "fixed").mkdir(mode=0o555)
    with pytest.raises(StudyError, match="Permission denied"), Results.open(tmp_path / "fixed", SMALL):
        pass


def test_folders_of_one_study_are_merged(tmp_path: Path) -> None:
    first, second = SMALL.changed(seeds=(0,)), SMALL.changed(seeds=(1, 2), criteria=("ip:snip",))
    filled(tmp_path / "a", first)
    filled(tmp_path / "b", second, Record(CELL, traceback="x"))
    both = Results.read(tmp_path / "a", tmp_path / "b")
    assert both.study.seeds == (0, 1, 2) and both.study.criteria == ("torch:random", "torch:l1", "ip:snip")
    assert len(both.frame()) == len(first.cells()) + len(second.cells()) and both.failures == {}
    filled(tmp_path / "c", SMALL.changed({"training.lr": 1.0}))
    with pytest.raises(StudyError, match="one study.*\n.*a' .there. and .*c' .here.: training.lr is 0.15 there"):
        Results.read(tmp_path / "a", tmp_path / "c")
    with pytest.raises(StudyError, match="must have a study.json"):
        Results.read(tmp_path)


def test_a_folder_grows_with_the_axes(tmp_path: Path) -> None:
    filled(tmp_path, SMALL.changed(seeds=(0,)))
    with Results.open(tmp_path, SMALL.changed(seeds=(1,))) as results:
        assert len(results.missing) == 10 and len(results.frame()) == 0
    assert Results.read(tmp_path).study.seeds == (0, 1)


@pytest.mark.parametrize("name", ["digits", "channels", "variety/cifar10-resnet"])
def test_results_of_the_repository_are_read_without_data(name: str) -> None:
    folder = ROOT / "benchmarks" / "results" / name
    results = Results.read(folder)
    frame = results.frame()
    with (folder / "results.csv").open() as file:
        assert len(frame) == len(file.readlines()) - 1
    assert set(results.study.spaces) == {"spatial", "interspace"} and frame["lr"].isna().all()
    assert frame["accuracy"].between(5, 100).all()


def test_names_of_files_are_readable_and_different() -> None:
    cells = [Cell("a:b", 0.9, space, 0) for space in ("interspace", "interspace(frozen=true)")]
    cells += [Cell("a-b", 0.9, "interspace", 0), Cell("a:b", 0.9, "interspace", 1)]
    names = [store._key(cell) for cell in cells]
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert names[0].startswith("a-b-0.9-interspace-0-") and set(versions()) == {"ip-plugin", "torch"}
