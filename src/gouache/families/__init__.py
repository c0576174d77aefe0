"""Model families: the facts that define each one, and how a file's family is recognised.

Family differences are data, not subclasses. Every statement about a file has its evidence and a confidence. Nothing
here imports torch.
"""
