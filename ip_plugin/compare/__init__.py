"""Studies: criteria side by side, ordinary (spatial) pruning against interspace pruning.

Four parts, each knows only those before it: `config` (what is to be run) -> `runs` (running one) -> `results` (keeping
them) -> `report` (showing them); `study` puts them together.
"""
