"""An embedding of one invented character, see `__main__`."""
