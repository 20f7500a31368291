"""Evaluation: methods compared on benchmarks, through lmms-eval."""

from .commands import register

__all__ = ["register"]
