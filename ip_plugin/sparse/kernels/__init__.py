"""Loops that numba compiles: sparse convolutions and pooling by non-zeros, Winograd's filtering, vector operations."""
