"""Pretraining: models of random weights in several sizes, and the objectives that train their parts."""
