"""A value that changes over the steps of a run: prompt scheduling is a timeline of conditionings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gouache.errors import RequestError

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Timeline(Generic[T]):
    """`spans` (last, value): each value holds up to and including step `last`; steps are counted 1 to n.

    After the last span its value holds on. Steps, not a share of them, because AUTOMATIC1111 counts a run that starts
    from a picture from its own first step, whatever share of the full run that is.
    """

    spans: tuple[tuple[int, T], ...]

    def __post_init__(self) -> None:
        ends = [last for last, _ in self.spans]
        if not ends or ends != sorted(set(ends)):
            raise RequestError("timeline", f"spans end at steps {ends}; expected one or more, rising")

    @classmethod
    def constant(cls, value: T) -> Timeline[T]:
        return cls(((1, value),))

    def at(self, step: int) -> T:
        """The value at `step`, 1 for the first."""
        return next((value for last, value in self.spans if step <= last), self.spans[-1][1])

    def map(self, change: Callable[[T], U]) -> Timeline[U]:
        return Timeline(tuple((last, change(value)) for last, value in self.spans))

    @property
    def values(self) -> Iterable[T]:
        return (value for _, value in self.spans)

    @property
    def changes(self) -> bool:
        return len(self.spans) > 1
