"""Tensor names as tables: the names of our networks, and the mapping from every other layout to them.

Nothing here reads a file or holds a tensor. A name that a table does not cover is reported.
"""
