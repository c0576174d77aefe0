"""Data to weights: one loop, an objective a file, and checkpoints that survive a crash.

`loop.py` is the straight line. It knows an objective only as losses and parameter groups, and a batch only as a
number: whatever chance a step needs is drawn from (seed, step), so a resumed run repeats the unbroken one exactly.
"""
