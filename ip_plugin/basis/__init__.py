"""Filter bases: pure functions of tensors that make, constrain, fit and learn them."""

from .bases import CONSTRAINTS, BasisSpec, Constraint, compose, constrained, inverse, is_standard, norms

__all__ = ["CONSTRAINTS", "BasisSpec", "Constraint", "compose", "constrained", "inverse", "is_standard", "norms"]
