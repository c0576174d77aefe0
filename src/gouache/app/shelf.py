"""The former names of `sources`, for modules that still import them."""

from gouache.app.sources import LibrarySource, RecordedSource


class LibraryShelf(LibrarySource):
    passed_over = LibrarySource.mentioned_for_other_models


class RecordedShelf(RecordedSource):
    by_hand = RecordedSource.attached_before
