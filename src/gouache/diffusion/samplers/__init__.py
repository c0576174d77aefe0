"""Samplers: stateless functions of a denoiser, a starting x, noise levels and a noise source.

`catalog` is the only module that maps names to samplers.
"""
