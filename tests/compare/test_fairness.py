"""What the spaces of a pair have in common, by hashes; learning rates tuned for each; and the settings of trainings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from records import result_of
from torch import Generator, Tensor, nn
from torch.nn import functional

from ip_plugin import load, masks
from ip_plugin.compare import Cell, Data, Study, data, models, run, tuning
from ip_plugin.compare.cell import check_budgets, execute, images_of, network_of
from ip_plugin.compare.data import Augmented, Split
from ip_plugin.compare.training import Training
from ip_plugin.errors import StudyError

pytestmark = pytest.mark.filterwarnings("ignore::ip_plugin.errors.LayerCollapseWarning")

QUICK = Study(training={"epochs": 2, "finetune_epochs": 1}, data={"train_images": 200})


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Hashes of the initial weights, and of the batches of every training."""
    hashes: dict[str, list[str]] = {"weights": [], "batches": []}
    for kind in (Split, Augmented):
        shuffled = kind.shuffled

        def watched(
            self: Any, size: int, order: Generator, shuffled: Any = shuffled, kind: Any = kind
        ) -> Iterator[Any]:
            for batch in shuffled(self, size, order):
                if type(self) is kind:
                    hashes["batches"].append(digest(*batch))
                yield batch

        monkeypatch.setattr(kind, "shuffled", watched)
    make = models.network

    def made(*arguments: Any) -> nn.Module:
        model = make(*arguments)
        hashes["weights"].append(digest(*model.state_dict().values()))
        return model

    monkeypatch.setattr(models, "network", made)
    return hashes


@pytest.mark.parametrize(
    ("criterion", "augment"),
    [
        ("dense", ()), ("torch:random", ()), ("torch:l1", ("RandomHorizontalFlip", "RandomCrop(8, padding=1)")),
        ("ip:rigl", ()), ("torch:l1+reinit", ()),
    ],
)  # fmt: skip
def test_all_spaces_see_the_same_weights_and_batches(
    criterion: str, augment: tuple[str, ...], seen: dict[str, list[str]]
) -> None:
    study = QUICK.changed({"data.augment": augment})
    everything = []
    for space in ("spatial", "interspace", "interspace(basis=dct, sharing=layer, frozen=true)"):
        execute(Cell(criterion, 0.0 if criterion == "dense" else 0.8, space, 1), study)
        everything.append({name: hashes[:] for name, hashes in seen.items()})
        for hashes in seen.values():
            hashes.clear()
    assert everything[0] == everything[1] == everything[2]
    epochs = {"torch:l1": 3, "torch:l1+reinit": 4}.get(criterion, 2)
    assert len(everything[0]["batches"]) == len(set(everything[0]["batches"])) == (4 if augment else 2) * epochs
    execute(Cell(criterion, 0.0 if criterion == "dense" else 0.8, "spatial", 2), study)
    assert seen["weights"][0] != everything[0]["weights"][0] and seen["batches"][0] != everything[0]["batches"][0]


# Learning rates


def test_the_learning_rate_of_each_space_is_the_best_on_validation_images_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = QUICK.changed({"tune.learning_rates": (0.5, 1e-5, 0.05), "tune.seeds": 2, "data.validation": 0.25})
    tuning._best.cache_clear()
    images = images_of(study)
    read: list[Any] = []
    batches = Split.batches

    def watched(self: Split, size: int) -> Any:
        read.append(self)
        return batches(self, size)

    monkeypatch.setattr(Split, "batches", watched)
    expected = {lr: tuning.validation_accuracy(study, "interspace", lr) for lr in (0.5, 1e-5, 0.05)}
    chosen = tuning.tuned_settings(study, "interspace").lr
    assert chosen == max(expected, key=expected.__getitem__) != 1e-5 and expected[1e-5] < 30
    assert any(part is images.validation for part in read) and not any(part is images.test for part in read)
    monkeypatch.undo()
    result = result_of(Cell("torch:l1", 0.9, "interspace", 0), study)
    assert result.lr == chosen and result == result_of(
        Cell("torch:l1", 0.9, "interspace", 0), study.changed({"tune.learning_rates": (), "training.lr": chosen})
    )


def test_each_space_has_its_own_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"spatial": 0.1, "interspace": 0.3}
    tuning._best.cache_clear()
    monkeypatch.setattr(tuning, "validation_accuracy", lambda study, space, lr: -abs(lr - best[space]))
    study = QUICK.changed({"tune.learning_rates": (0.1, 0.2, 0.3), "data.validation": 0.2})
    rates = [result_of(Cell("dense", 0.0, space, 0), study).lr for space in best]
    tuning._best.cache_clear()
    assert rates == [0.1, 0.3]


def test_learning_rates_are_tuned_once_and_handed_to_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, float]] = []

    def accuracy(study: Study, space: str, lr: float) -> float:
        tried.append((space, lr))
        return -abs(lr - 0.2)

    tuning._best.cache_clear()
    monkeypatch.setattr(tuning, "validation_accuracy", accuracy)
    study = QUICK.changed({"tune.learning_rates": (0.1, 0.2), "data.validation": 0.2}, criteria="torch:l1", seeds=0)
    handed: list[Study] = []

    def engine(cells: Any, study: Study, watcher: Any) -> Any:
        handed.append(study)
        yield execute(cells[0], study)

    for _ in range(2):  # the second time rates are those of the records, where there are any
        run(study, tmp_path, engine=engine)
        tuning._best.cache_clear()
    assert handed[0].tune.rates == handed[1].tune.rates == {"spatial": 0.2, "interspace": 0.2}
    assert tried == [("spatial", 0.1), ("spatial", 0.2), *2 * [("interspace", 0.1), ("interspace", 0.2)]]
    assert tuning.tuned_settings(handed[0], "spatial").lr == 0.2


def test_tuning_needs_validation_images() -> None:
    with pytest.raises(StudyError, match=r"set for example data.validation"):
        check_budgets(QUICK.changed({"tune.learning_rates": (0.1,)}))


# Settings


def trained(study: Study, steps: list[dict[str, Any]] | None = None) -> tuple[Training, Any]:
    images = images_of(study)
    torch.manual_seed(0)
    training = Training(network_of(study, images), images, study.training, 0)
    kept: list[Any] = []

    def begin(optimizer: Any) -> Any:
        kept.append(optimizer)
        return lambda loss: steps.append(dict(optimizer.param_groups[0])) if steps is not None else None

    training.train(begin)
    return training, kept[0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("steps", [0.1, 0.1, 0.01, 0.001]), ("cosine", [0.1 * (1 + c) / 2 for c in (0.5**0.5, 0.0, -(0.5**0.5), -1.0)])],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    training, _ = trained(QUICK.changed({"training.epochs": 4, "training.schedule": schedule, "training.lr": 0.1}))
    if schedule == "steps":  # after the last step of each of four epochs: from a half 0.01, from three quarters 0.001
        expected = [0.1, 0.01, 0.001, 0.001]
    assert [epoch.lr for epoch in training.curve] == pytest.approx(expected, abs=1e-9)
    assert [epoch.epoch for epoch in training.curve] == [1, 2, 3, 4]


def test_one_cycle_moves_the_momentum_around_the_one_that_is_set() -> None:
    steps: list[dict[str, Any]] = []
    trained(QUICK.changed({"training.epochs": 10, "training.momentum": 0.8}), steps)
    momenta = [step["momentum"] for step in steps]
    assert min(momenta) == pytest.approx(0.75) and max(momenta) == pytest.approx(0.85)
    trained(QUICK.changed({"training.momentum": 0.0}), steps := [])
    assert {step["momentum"] for step in steps} == {0.0}


def test_adamw_and_label_smoothing() -> None:
    study = QUICK.changed({"training.optimizer": "adamw", "training.lr": 0.01, "training.label_smoothing": 0.2})
    training, optimizer = trained(study)
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["weight_decay"] == 5e-4
    outputs, labels = torch.randn(5, 10), torch.arange(5)
    assert training.loss(outputs, labels) == functional.cross_entropy(outputs, labels, label_smoothing=0.2)
    assert training.curve[-1].loss < training.curve[0].loss


def test_half_precision_channels_last_and_compilation(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    kinds: list[Any] = []
    compiled: list[Any] = []

    def compile(model: nn.Module) -> Any:
        compiled.append(model)

        def run(images: Tensor) -> Any:
            outputs = model(images)
            kinds.append((outputs.dtype, images.is_contiguous(memory_format=torch.channels_last)))
            return outputs

        return run

    monkeypatch.setattr(torch, "compile", compile)
    options = {"training.amp": True, "training.channels_last": True, "training.compile": True}
    training, _ = trained(QUICK.changed(options))
    assert compiled == [training.model] and set(kinds) == {(torch.bfloat16, True)}
    weight: Any = training.model[3].weight  # type: ignore[index]
    assert weight.dtype == torch.float32 and weight.is_contiguous(memory_format=torch.channels_last)


def test_models_and_masks_are_kept_on_request() -> None:
    cell, study = Cell("torch:l1", 0.9, "interspace", 0), QUICK.changed({"measure.keep": ("models", "masks")})
    record = execute(cell, study)
    assert record.files.keys() == {"model.safetensors", "masks.safetensors"} and not execute(cell, QUICK).files
    from safetensors.torch import load as read

    kept = read(record.files["masks.safetensors"])
    model = network_of(study, images_of(study))
    from io import BytesIO
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(BytesIO(record.files["model.safetensors"]).getvalue())
        load(model, path)
    assert record.result is not None and record.result.file_bytes == len(record.files["model.safetensors"])
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in kept.items())
    assert record.density == {name: round(float(mask.double().mean()), 6) for name, mask in kept.items()}
    assert data.load(Data(train_images=200)) is images_of(study)  # loaded once
