"""Training runs as users start them: settings and a folder of pictures in, a file that other tools read out.

`runs.py` is the main pipeline. Everything of a run is in its folder: settings, checkpoints, log, samples, caches.
"""
