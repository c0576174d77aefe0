"""Networks and nothing else: torch in, tensors out, under the names that files in the wild carry.

This room imports nothing of ours but the errors. Families, files and devices are somebody else's business.
"""
