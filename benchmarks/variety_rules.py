"""Rules for filter variety side by side: which channels of a trained network to cut, then a short fine-tuning.

    python benchmarks/variety_rules.py --data cifar10.npz --seeds 0,1,2 --output rules.csv

Started again, it goes on where it was. Accuracy is that on every second test image. "pair" is the rule of
`ip_plugin.methods.filter_variety` and "pair 0.5" the same at half strength; "none" is the criterion alone.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from sklearn.cluster import KMeans
from torch import Tensor, nn

from ip_plugin.adapters.torch_pruning import pruner
from ip_plugin.adapters.torch_pruning.variety import made_by
from ip_plugin.compare import Study
from ip_plugin.compare.cell import images_of, network_of
from ip_plugin.compare.data import Split
from ip_plugin.compare.training import Training, accuracy
from ip_plugin.methods.filter_variety import similarities, varied

#: (scores, filters, how many are kept) -> scores by which the redundant ones go first.
Rule = Callable[[Tensor, Tensor, int], Tensor]


def dealt(scores: Tensor, order: Tensor) -> Tensor:
    """The scores, the lowest one for the filter that goes first."""
    found = torch.empty_like(scores)
    found[order] = scores.sort().values
    return found


def ranks(scores: Tensor) -> Tensor:
    return scores.double().argsort().argsort().double() / max(1, len(scores) - 1)


def marginal_relevance(weight: float, scores: Tensor, filters: Tensor, kept: int) -> Tensor:
    """Taken one by one: rank of the score against the largest similarity to what is taken (Carbonell, Goldstein)."""
    del kept
    similarity, rank = similarities(filters).double(), ranks(scores)
    taken = [int(rank.argmax())]
    nearest = similarity[taken[0]].clone()
    left = [each for each in range(len(scores)) if each not in taken]
    while left:
        best = left.pop(int((weight * rank[left] - (1 - weight) * nearest[left]).argmax()))
        taken.append(best)
        nearest = torch.maximum(nearest, similarity[best])
    return dealt(scores, torch.tensor(taken[::-1]))


def facility_location(weighted: bool, scores: Tensor, filters: Tensor, kept: int) -> Tensor:
    """Taken one by one: what adds most to the sum over all filters of their similarity to the nearest one taken."""
    del kept
    similarity = similarities(filters).double().clamp_min(0)
    weights = scores.double().clamp_min(0) if weighted else torch.ones(len(scores)).double()
    ties, covered = ranks(scores) * 1e-6, torch.zeros(len(scores)).double()
    left, taken = torch.ones(len(scores), dtype=torch.bool), []
    for _ in range(len(scores)):
        gains = (weights[:, None] * (similarity - covered[:, None]).clamp_min(0)).sum(0) + ties
        best = int(gains.masked_fill(~left, -1e30).argmax())
        taken.append(best)
        left[best] = False
        covered = torch.maximum(covered, similarity[:, best])
    return dealt(scores, torch.tensor(taken[::-1]))


def representatives(scores: Tensor, filters: Tensor, kept: int) -> Tensor:
    """The best of each of as many clusters of directions (k-means) as filters are kept."""
    flat = filters.flatten(1)
    flat = (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).double()
    labels = torch.tensor(KMeans(kept, n_init=4, random_state=0).fit_predict(flat.numpy()))
    worth = scores.double().clone()
    best = [max((labels == c).nonzero()[:, 0].tolist(), key=lambda i: float(scores[i])) for c in labels.unique()]
    worth[best] += worth.max() - worth.min() + 1
    return dealt(scores, worth.argsort())


RULES: dict[str, Rule] = {
    "none": lambda scores, filters, kept: scores,  # noqa: ARG005
    "pair": lambda scores, filters, kept: varied(scores, filters, 1.0),  # noqa: ARG005
    "pair 0.5": lambda scores, filters, kept: varied(scores, filters, 0.5),  # noqa: ARG005
    "marginal relevance 0.5": partial(marginal_relevance, 0.5),
    "marginal relevance 0.8": partial(marginal_relevance, 0.8),
    "facility location": partial(facility_location, False),
    "facility location, weighted": partial(facility_location, True),
    "k-means": representatives,
}
CRITERIA = {"l1": partial(tp.importance.GroupMagnitudeImportance, 1), "random": tp.importance.RandomImportance}


def importance(criterion: str, rule: Rule, ratio: float) -> Callable[..., Tensor]:
    inner = CRITERIA[criterion]()

    def found(group: Any) -> Tensor:
        scores = inner(group)
        filters = made_by(group, len(scores), lambda layer: layer.weight.detach())
        assert filters is not None
        return rule(scores, filters, len(scores) - int(len(scores) * ratio))

    return found


def measure(study: Study, seed: int, cells: list[tuple[str, float, str]]) -> Iterator[tuple[Any, ...]]:
    """Train one network, and cut copies of it."""
    images = images_of(study)
    assert isinstance(images.train, Split)
    assert isinstance(images.test, Split)
    test = Split(images.test.images[::2], images.test.labels[::2])
    torch.manual_seed(seed)
    dense = network_of(study, images)
    Training(dense, images, study.training, seed).train()
    for criterion, ratio, rule in cells:
        model = copy.deepcopy(dense).eval()
        last = [module for module in model.modules() if isinstance(module, nn.Linear)]
        torch.manual_seed(seed + 1000)
        scorer = importance(criterion, RULES[rule], ratio)
        pruner(
            tp.pruner.BasePruner,
            model,
            images.train.images[:1],
            importance=scorer,
            pruning_ratio=ratio,
            ignored_layers=last,
        ).step()
        before = accuracy(model, test)
        Training(model, images, study.training, seed + 100).finetune()
        yield seed, criterion, rule, ratio, accuracy(model, test), before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    study = Study(
        data={"source": given.data, "train_images": 10000, "augment": ("RandomHorizontalFlip",)},
        model={"name": {"cifar10": "auto", "cifar10-resnet": "resnet"}[given.task]},
        training={"epochs": 8, "finetune_epochs": 3},
    )
    torch.set_num_threads(1)
    if not given.output.exists():
        given.output.write_text("seed,criterion,rule,ratio,accuracy,accuracy_before_finetuning\n")
    with given.output.open(newline="") as file:
        done = {(row["seed"], row["criterion"], row["rule"], float(row["ratio"])) for row in csv.DictReader(file)}
    for seed in given.seeds.split(","):
        grid = product(CRITERIA, (0.5, 0.3, 0.7), RULES)
        cells = [(c, ratio, rule) for c, ratio, rule in grid if (seed, c, rule, ratio) not in done]
        for row in measure(study, int(seed), cells) if cells else ():
            with given.output.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(row)


if __name__ == "__main__":
    main()
