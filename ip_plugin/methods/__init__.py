"""Sparse training and post-training pruning, in either space.

`scores` rate every prunable entry, `selection` turns scores into masks, and the rest says when to prune: once, in
rounds or gradually while training (`schedules`), repeatedly with rewinding (`lottery_ticket`), with masks that change
while training (`dynamic`), or without training (`post_training`). What each layer alone can lose is measured by
`layer_sensitivity`.
"""

from .derivatives import Batches, Loss
from .dynamic import SET, RigL
from .layer_sensitivity import Sensitivity, sensitivity
from .lottery_ticket import LotteryTicket
from .post_training.fitted import prune_fitted
from .post_training.reconstruction import reconstruct, reestimate_batch_norm
from .post_training.refinement import refine
from .schedules import Gradual, Score, prune
from .scores import Movement, Scores, grasp, lamp, magnitude, movement, random, ranks, snip, synflow
from .selection import Masks, NofM, Scope, apply_masks, erk, select

__all__ = [
    "SET",
    "Batches",
    "Gradual",
    "Loss",
    "LotteryTicket",
    "Masks",
    "Movement",
    "NofM",
    "RigL",
    "Scope",
    "Score",
    "Scores",
    "Sensitivity",
    "apply_masks",
    "erk",
    "grasp",
    "lamp",
    "magnitude",
    "movement",
    "prune",
    "prune_fitted",
    "random",
    "ranks",
    "reconstruct",
    "reestimate_batch_norm",
    "refine",
    "select",
    "sensitivity",
    "snip",
    "synflow",
]
