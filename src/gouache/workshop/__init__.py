"""Files in, files out, a tensor at a time: no network is ever built here."""
