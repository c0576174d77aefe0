"""The former name of `search_paths`, for modules that still import it."""

from gouache.app.search_paths import Candidate, candidates

__all__ = ["Candidate", "candidates"]
