"""Prompts: from the text that a user writes, over schedules, weights, tokens and chunks, to conditioning.

This package contains no network: it receives text encoders, and a `TextRecipe` states how a model family uses them.
"""
