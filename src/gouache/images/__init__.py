"""Pictures as files and as tensors. Nothing here knows a model."""
