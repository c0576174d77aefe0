"""Tags in A1111's prompts: `<lora:name:0.8>`, `<lyco:name:te=0.5:unet=1>`, `<hypernet:name:1>`.

They name files and are no input of a text encoder, so they are removed before a prompt is parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("lora", "lyco", "hypernet")
_START = re.compile(rf"<({'|'.join(KINDS)}):", re.IGNORECASE)


@dataclass(frozen=True)
class Tag:
    """`kind` is one of KINDS; `argument` is the text after its colon, as written: "name:0.8"."""

    kind: str
    argument: str

    def __str__(self) -> str:
        return f"<{self.kind}:{self.argument}>"


def strip_comments(text: str) -> str:
    """`text` without what follows a `#` in each line, as A1111 reads prompts by default."""
    return "\n".join(line.partition("#")[0].rstrip() if "#" in line else line for line in text.split("\n")).strip("\n")


def take_tags(text: str) -> tuple[str, list[Tag]]:
    """(the prompt without its tags, the tags in order). A tag ends at the first `>`; without one it stays in the text.

    Tags of unknown kinds stay in the text too.
    """
    tags: list[Tag] = []
    pieces: list[str] = []
    done = 0
    for start in _START.finditer(text):
        if start.start() < done:
            continue  # inside a tag, whose name has a "<"
        end = text.find(">", start.end())
        if end < 0:
            break
        if argument := text[start.end() : end].strip():
            pieces.append(text[done : start.start()])
            tags.append(Tag(start[1].lower(), argument))
            done = end + 1
    return "".join([*pieces, text[done:]]), tags
