"""Seeing a selection: recall curves, heat maps, embeddings and the report."""

from .commands import register

__all__ = ["register"]
