"""Needle videos, their questions, and the recipe of the tiny checkpoints that answer them."""
