"""Learning rates tuned for each space: the same grid, on the validation images, with the dense network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from ip_plugin.errors import StudyError
from ip_plugin.utils.seeds import derived_seed, seeded

from . import config, criteria
from .config import DENSE, Cell, SpaceSpec, Study


def check_tuning(study: Study) -> None:
    """Raise StudyError if a study tunes learning rates without validation images, or with some that are not above 0."""
    rates = study.tune.learning_rates
    if rates and not study.data.validation:
        rule, remedy = (
            "To tune learning rates, there must be validation images.",
            "set for example data.validation = 0.2",
        )
        raise StudyError(rule, f"tune.learning_rates = {list(rates)}, data.validation = 0", remedy)
    if any(not rate > 0 for rate in rates):
        raise StudyError("Learning rates must be above 0.", f"{list(rates)}", "change tune.learning_rates")


def tuned_settings(study: Study, space: str) -> config.Training:
    """The training of a study, with the learning rate that is tuned for a space.

    >>> tuned_settings(Study(), "spatial").lr
    0.15
    """
    rate = study.tune.rates.get(space)
    if rate is None and study.tune.learning_rates:
        check_tuning(study)
        rate = _best(study.model_dump_json(include={"data", "model", "training", "tune"}), space)
    return study.training if rate is None else study.training.model_copy(update={"lr": rate})


def with_rates(study: Study, known: Mapping[str, float]) -> Study:
    """The study with the learning rate of each space, so that it is not tuned in every process.

    Args:
        study: which study.
        known: rates that were tuned before, by space.
    """
    if not study.tune.learning_rates:
        return study
    threads = torch.get_num_threads()
    torch.set_num_threads(study.training.threads)
    try:
        missing = [space for space in study.spaces if space not in known]
        rates = {**known, **{space: tuned_settings(study, space).lr for space in missing}}
    finally:
        torch.set_num_threads(threads)
    return study.changed({"tune.rates": rates})


@lru_cache(maxsize=32)
def _best(text: str, space: str) -> float:
    """The learning rate whose networks, of all seeds, are the most accurate on the validation images.

    Of equal ones the first of the grid is taken.
    """
    study = Study.model_validate_json(text)
    means = {lr: validation_accuracy(study, space, lr) for lr in study.tune.learning_rates}
    return max(means, key=means.__getitem__)


def validation_accuracy(study: Study, space: str, lr: float) -> float:
    """Mean accuracy on the validation images of dense networks that are trained with a learning rate, in percent.

    Their seeds are those of no cell.
    """
    from .cell import convert, images_of, network_of
    from .training import Training, accuracy

    images = images_of(study)
    assert images.validation is not None
    settings = study.training.model_copy(update={"lr": lr})
    total = 0.0
    for number in range(study.tune.seeds):
        seed = derived_seed(number, "learning rate")
        with seeded(seed, settings.device):
            model = network_of(study, images)
            cell = Cell(DENSE, 0.0, space, seed)
            convert(model, cell, SpaceSpec.parse(space), criteria.load(DENSE))
            Training(model, images, settings, seed).train()
        total += accuracy(model, images.validation)
    return total / study.tune.seeds
