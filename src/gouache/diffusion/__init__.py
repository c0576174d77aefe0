"""The mathematics: noise levels, denoisers, guidance, noise and samplers.

Knows no network, file or prompt: only tensors and callables that are handed in.
"""
