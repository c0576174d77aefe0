"""Pictures as files, values and tensors. This package does not depend on any model."""
