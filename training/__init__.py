"""Training of Lite selectors: data, teacher scores, students and the trainer."""

from .commands import register

__all__ = ["register"]
