"""Commands that read model files and write model files, one tensor at a time. No network is built here."""
