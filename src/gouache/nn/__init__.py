"""Networks only: tensors in, tensors out, with the parameter names of the published files.

This package imports only `errors` from Gouache. Families, files and devices are handled elsewhere.
"""
