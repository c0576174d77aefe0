"""Gouache and diffusers timed in one run with the same weights: python -m benchmarks [--quick] [--dtype bf16]"""
