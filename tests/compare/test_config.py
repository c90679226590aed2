"""The schema of studies: what is understood, what is refused and where, and the file that describes it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ip_plugin.compare.config import AXES, Config, Study, commented, described, read
from ip_plugin.errors import StudyError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sparsities": "90,95%,0.98"}, (0.9, 0.95, 0.98)),
        ({"sparsities": [90, "0.5"]}, (0.9, 0.5)),
        ({"seeds": "5..9"}, (5, 6, 7, 8, 9)),
        ({"seeds": "0, 3..4"}, (0, 3, 4)),
        ({"seeds": range(2)}, (0, 1)),
        ({"seeds": 3}, (3,)),
        ({"spaces": "SP,IP"}, ("spatial", "interspace")),
        ({"spaces": "IP(sharing=layer, basis=dct),ip"}, ("interspace(basis=dct, sharing=layer)", "interspace")),
        ({"spaces": "interspace(frozen)"}, ("interspace(frozen=true)",)),
        ({"spaces": "interspace(basis=orthonormal)"}, ("interspace",)),
        ({"criteria": "l1_init,ip:snip"}, ("torch:l1_init", "ip:snip")),
    ],
)
def test_values_are_read_as_people_write_them(values: dict[str, Any], expected: object) -> None:
    study = Study(**values)
    assert getattr(study, next(iter(values))) == expected
    assert Study(**study.model_dump()) == study == Study.model_validate_json(study.model_dump_json())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Study(criteria=("torch:l7",)), "'torch:l7'\n.*torch:l1"),
        (lambda: Study(criteria=("l1",)), "'l1'\nWhat to do: use one of torch:l1, tp:l1"),
        (lambda: Study(criteria=("magnitud",)), "'magnitud'\nWhat to do: use '.*magnitude'"),
        (lambda: Study(criteria=("jax:l1",)), "'jax:l1'"),
        (lambda: Study(criteria=()), "criteria"),
        (lambda: Study(sparsities=(0.9, 1.0)), "below 1.\nFound: 1.0"),
        (lambda: Study(sparsities=(-0.1,)), "-0.1"),
        (lambda: Study(sparsities=(float("nan"),)), "nan"),
        (lambda: Study(sparsities="0.9,many"), "'0.9,many'\nWhat to do: write for example"),  # type: ignore[arg-type]
        (lambda: Study(spaces=("fourier",)), "'fourier'"),
        (lambda: Study(spaces=("interspac",)), "'interspac'\nWhat to do: use 'interspace'"),
        (lambda: Study(spaces=("interspace(basis=dkt)",)), "`basis` must be .*\nFound: 'dkt'\nWhat to do: use 'dct'"),
        (lambda: Study(spaces=("spatial(basis=dct)",)), "has no bases"),
        (lambda: Study(seeds=(0, 0)), "every value once"),
        (lambda: Study(seeds=(-1,)), "-1"),
        (lambda: Study(training={"epochs": 0}), "`epochs` must be greater than or equal to 1.\nFound: 0"),
        (lambda: Study(training={"optimizer": "adam"}), "'adam'\nWhat to do: use 'adamw'"),
        (lambda: Study(training={"optimiser": "sgd"}), "'optimiser'\nWhat to do: use 'optimizer'"),
        (lambda: Study().changed({"training.lr": "fast"}), "`lr` must be a valid number.*\nFound: 'fast'"),
        (lambda: Study().changed({"name.first": 1}), "name"),
    ],
)
def test_studies_that_make_no_sense_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(StudyError, match=text):
        make()


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        ("[training]\nepochs = 3\nlearning_rat = 1", 3, "use one of"),
        ("seedz = [1]", 1, "use 'seeds'"),
        ('# comment\n\n[training]\nschedule = "cosin"', 4, "use 'cosine'"),
        ('criteria = [\n  "torch:l1",\n  "torch:l9",\n]', 3, "torch:l1"),
        ("training.epochs = 0", 1, "change epochs"),
        ("[run]\nengine = 'dusk'", 2, "use 'dask'"),
        ("[training]\nepochs = 1\n[training.more]\nx = 1", 3, "use one of"),
        ("data = 3", 1, "change data"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(text: str, line: int, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(StudyError, match=f"study.toml, line {line}\\)") as caught:
        read(path)
    assert remedy in str(caught.value)


def test_what_is_no_file_of_toml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    for content, text in (("x = 1\ny = ]", "line 2"), (None, "No such file")):
        if content:
            path.write_text(content)
        else:
            path.unlink()
        with pytest.raises(StudyError, match=text):
            read(path)


def test_options_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('seeds = "0..2"\n[training]\nepochs = 3\nlr = 0.2\n')
    config = read(path, {"training.epochs": "5", "run.jobs": 2})
    assert (config.training.epochs, config.training.lr, config.seeds, config.run.jobs) == (5, 0.2, (0, 1, 2), 2)
    with pytest.raises(StudyError, match="Found: 0\n"):  # of the option, not of a line
        read(path, {"training.epochs": 0})
    assert type(config.study()) is Study


def test_the_commented_file_holds_every_field_and_reads_as_the_default(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(commented())
    assert read(path) == Config()
    lines = commented().splitlines()
    values = Config().model_dump()
    for table, fields in values.items():
        for name in fields if isinstance(fields, dict) else [table]:
            description, _ = described(f"{table}.{name}" if isinstance(fields, dict) else table)
            assert description and lines[lines.index(f"# {description}") + 1].lstrip("# ").startswith(f"{name} =")
    assert set(tomllib.loads(commented())) == set(values)


def test_the_grid_is_whole_and_pairs_run_one_after_the_other() -> None:
    study = Study()
    cells = study.cells()
    assert len(cells) == len(set(cells)) == (2 * 3 + 1) * 2 * 6
    for spatial, inter in zip(cells[::2], cells[1::2], strict=True):
        assert inter == spatial._replace(space="interspace") and spatial.space == "spatial"
    assert [cell.criterion for cell in cells if cell.sparsity == 0] == ["dense"] * 12


def test_what_results_have_in_common_is_all_but_axes_and_logs() -> None:
    study = Study()
    axes = {"criteria": "ip:snip", "sparsities": 0.5, "spaces": "IP", "seeds": 9, "name": "other"}
    assert set(axes) == set(AXES)
    assert study.changed(axes).common() == study.common() == study.changed({"measure.tensorboard": True}).common()
    for name, value in (("training.threads", 2), ("measure.deploy_threads", 1), ("model.options", {"width": 2})):
        assert study.changed({name: value}).common() != study.common()
