"""Request in, pictures out: `run.paint` is the main pipeline."""
