"""Training: one loop, one file per objective, and checkpoints that survive a crash.

`loop.py` is the main pipeline. It knows an objective only by its losses, parameter groups and configuration, and a
batch only by its number. All random numbers of a step are derived from (seed, step), so a resumed run is bit-equal to
an uninterrupted one.
"""
