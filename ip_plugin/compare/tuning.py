"""Learning rates tuned for each space: the same grid, on the validation images, with the dense network."""

from __future__ import annotations

from functools import lru_cache

from ip_plugin.errors import StudyError
from ip_plugin.utils.seeds import derived_seed

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
    if not study.tune.learning_rates:
        return study.training
    check_tuning(study)
    text = study.model_dump_json(include={"data", "model", "training", "tune"})
    return study.training.model_copy(update={"lr": _best(text, space)})


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
    from .cell import convert, images_of, network_of, seeded
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
