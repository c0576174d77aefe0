"""Data sets of pictures with captions: read from the layouts that trainers use, checked, split and cut to sizes.

A data set is a list of `Record`s. Nothing here knows a model; `training` turns records into latents and conditioning.
"""
