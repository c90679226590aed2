"""Studies: criteria side by side, ordinary (spatial) pruning against interspace pruning.

What is to be run (`config`, with `tasks` and `criteria`), running one cell (`runs`), many of them (`processes`,
`nni_engine`), keeping them (`results`) and showing them (`report`); `study` puts these together.
"""
