"""Compact checkpoints: `save`, `load`, and what is in a file."""

from .api import load, save

__all__ = ["load", "save"]
