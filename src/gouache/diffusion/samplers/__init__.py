"""A sampler is a function of a denoiser, a starting point, noise levels and a source of noise; it keeps nothing.

`catalog` is the one place that knows them by name.
"""
