"""Prompt-based continual learning with gradient projection."""

__version__ = "0.1.0"
