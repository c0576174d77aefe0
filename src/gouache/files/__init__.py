"""Tensor files as records: `open_model` turns any path into a `ModelFile`; `write` turns tensors back into a file.

The content decides what a file is, not its suffix. Nothing in a file is ever run. A file is replaced whole or not
at all. This folder knows no architecture: `layouts` and `families` interpret the tensor names.
"""
