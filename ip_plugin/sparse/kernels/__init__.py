"""Loops that numba compiles: sparse convolutions, pooling, Winograd's minimal filtering, vector operations."""
