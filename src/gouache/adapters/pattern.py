"""Regular expressions of PEFT's `alpha_pattern` and `rank_pattern`, matched in bounded time.

They come from a stranger's file, and Python's `re` backtracks: `([a-z.]+)+Z` takes years on a module's name. Here a
pattern becomes a set of states, all of which are followed at once (Thompson 1968): the time of a match is at most the
length of the name times the number of states.

Supported is what users of PEFT write: literals, `.`, escapes (`\\.`, `\\d`, `\\w`, `\\s`), `[a-z]`, groups, `|`, `*`,
`+`, `?`, `{m,n}`, and `^` and `$` at the ends. A pattern with anything else never matches, as one that is not valid.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_PATTERN = 300  # characters
MAX_STATES = 2000

_Test = Callable[[str], bool]
_CLASSES: dict[str, _Test] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
    "D": lambda c: not c.isdecimal(),
    "W": lambda c: not (c.isalnum() or c == "_"),
    "S": lambda c: not c.isspace(),
}


class Unsupported(ValueError):
    """The pattern is not valid, too long, or has something that is not supported."""


class Pattern:
    """`Pattern(text).ends(name)`: whether `(.*\\.)?(text)$` matches all of `name`, as PEFT asks."""

    def __init__(self, text: str) -> None:
        """Raises Unsupported."""
        if len(text) > MAX_PATTERN:
            raise Unsupported
        self.work = 0  # states visited so far
        self._tests: list[_Test | None] = []  # of each state; None: it is passed without a character
        self._next: list[list[int]] = []
        self._text, self._at = text.removeprefix("^").removesuffix("$"), 0
        if text.endswith("\\$"):
            self._text = text.removeprefix("^")
        self._anchored = text.startswith("^")
        self._plain = all(c.isalnum() or c in "_.-" for c in self._text)
        self._end = self._state(None)
        self._start = 0 if self._plain else self._alternatives(self._end)
        if self._at < len(self._text) and not self._plain:
            raise Unsupported

    def ends(self, name: str) -> bool:
        if self._plain:  # most patterns are names of modules
            start = len(name) - len(self._text)
            self.work += 1
            if start < 0 or (start and (self._anchored or name[start - 1] != ".")):
                return False
            if name.endswith(self._text):
                return True
            self.work += len(self._text)
            return "." in self._text and all(p in (".", c) for p, c in zip(self._text, name[start:]))
        states = self._closure([self._start])
        for character in name:
            reached = [
                following
                for state in states
                if (test := self._tests[state]) is not None and test(character)
                for following in self._next[state]
            ]
            if character == "." and not self._anchored:
                reached.append(self._start)
            states = self._closure(reached)
        return self._end in states

    def _closure(self, states: list[int]) -> set[int]:
        found, left = set(states), list(states)
        while left:
            state = left.pop()
            self.work += 1
            if self._tests[state] is None:
                new = [each for each in self._next[state] if each not in found]
                found.update(new)
                left += new
        return found

    # ---- the pattern, read once; each function returns the first state of what it reads, which goes on to `after`

    def _state(self, test: _Test | None, *following: int) -> int:
        if len(self._tests) >= MAX_STATES:
            raise Unsupported
        self._tests.append(test)
        self._next.append(list(following))
        return len(self._tests) - 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _alternatives(self, after: int, depth: int = 0) -> int:
        if depth > 20:
            raise Unsupported
        starts = [self._sequence(after, depth)]
        while self._peek() == "|":
            self._at += 1
            starts.append(self._sequence(after, depth))
        return starts[0] if len(starts) == 1 else self._state(None, *starts)

    def _sequence(self, after: int, depth: int) -> int:
        """The items are found first, since each needs the state after it; they are built from the last."""
        items: list[tuple[int, int, int, int | None]] = []  # from, to: its text; least, most: its repetitions
        while self._peek() not in ("", "|", ")"):
            begin = self._at
            self._item(self._end, depth)
            end = self._at
            items.append((begin, end, *self._repetitions()))
        stop, start = self._at, after
        for begin, end, least, most in reversed(items):
            start = self._repeated(begin, end, least, most, start, depth)
        self._at = stop
        return start

    def _repeated(self, begin: int, end: int, least: int, most: int | None, after: int, depth: int) -> int:
        def once(following: int) -> int:
            self._at = begin
            return self._item(following, depth)

        start = after
        if most is None:
            loop = self._state(None, after)
            self._next[loop].append(once(loop))
            start = loop
        else:
            for _ in range(most - least):
                start = self._state(None, once(start), after)
        for _ in range(least):
            start = once(start)
        self._at = end
        return start

    def _repetitions(self) -> tuple[int, int | None]:
        sign = self._peek()
        if sign == "{":
            close = self._text.find("}", self._at)
            low, comma, high = self._text[self._at + 1 : close].partition(",")
            if close < 0 or not low.isdecimal() or (high and not high.isdecimal()) or len(low + high) > 4:
                raise Unsupported
            self._at = close + 1
            bounds = (int(low), int(high) if high else None if comma else int(low))
        elif sign and sign in "*+?":
            self._at += 1
            bounds = (int(sign == "+"), 1 if sign == "?" else None)
        else:
            return 1, 1
        if self._peek() == "?":  # a reluctant one matches the same names
            self._at += 1
        if (self._peek() and self._peek() in "*+{") or (bounds[1] is not None and bounds[1] < bounds[0]):
            raise Unsupported
        return bounds

    def _item(self, after: int, depth: int) -> int:
        character = self._peek()
        self._at += 1
        match character:
            case "(":
                if self._peek() == "?":
                    if self._text[self._at : self._at + 2] != "?:":
                        raise Unsupported
                    self._at += 2
                start = self._alternatives(after, depth + 1)
                if self._peek() != ")":
                    raise Unsupported
                self._at += 1
                return start
            case "[":
                return self._state(self._set(), after)
            case ".":
                return self._state(lambda c: c != "\n", after)
            case "\\":
                return self._state(self._escaped(), after)
            case "*" | "+" | "?" | "{" | "}" | "^" | "$" | ")" | "":
                raise Unsupported
            case _:
                return self._state(character.__eq__, after)

    def _escaped(self) -> _Test:
        character = self._peek()
        self._at += 1
        if character in _CLASSES:
            return _CLASSES[character]
        if not character or character.isalnum():
            raise Unsupported
        return character.__eq__

    def _set(self) -> _Test:
        inverted = self._peek() == "^"
        self._at += inverted
        tests: list[_Test] = []
        while self._peek() != "]" or not tests:
            character = self._peek()
            self._at += 1
            if not character:
                raise Unsupported
            if character == "\\":
                tests.append(self._escaped())
            elif self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                last = self._text[self._at + 1]
                self._at += 2
                if last == "\\" or last < character:
                    raise Unsupported
                tests.append(lambda c, low=character, high=last: low <= c <= high)  # type: ignore[misc]
            else:
                tests.append(character.__eq__)
        self._at += 1
        return lambda c: any(test(c) for test in tests) != inverted
