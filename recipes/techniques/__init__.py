"""The same five drawings learnt in four ways, see `__main__`."""
