"""A hypernetwork of a drawing style, see `__main__`."""
