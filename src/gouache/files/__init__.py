"""Tensor files as records: any path becomes a `ModelFile`, and tensors become a file again.

Content decides what a file is; nothing in a file is ever run; a file is replaced whole or not at all. Knows no
architecture: what the names mean is for `layouts` and `families` to say.
"""
