"""Studies: criteria side by side, ordinary (spatial) pruning against interspace pruning.

A study goes one way: `config` (with `tasks` and `criteria`) says what to run, `engines` run its cells (`cell`), `store`
keeps their results, `analysis` says what they mean, `report` shows it. `study` puts these together.
"""
