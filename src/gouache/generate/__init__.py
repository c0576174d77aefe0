"""Request in, pictures out. `run.paint` is the first straight line of the house."""
