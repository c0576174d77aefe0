"""Caption templates: sentences in which a word, and the caption of a picture, are put (textual inversion).

[name] is the word and [filewords] the caption of the picture, as in the template files of AUTOMATIC1111's web UI.
"""

from __future__ import annotations

from pathlib import Path

from gouache.errors import FileError, RequestError, printable
from gouache.outside import read_text

NAME, FILEWORDS = "[name]", "[filewords]"
# As Gal et al. 2022 train a subject and a style: neutral sentences, so that the word alone carries what is common.
SUBJECT = tuple(
    f"{before} {NAME}"
    for before in (
        "a photo of a", "a picture of a", "a rendering of a", "a close-up of a", "a cropped photo of the",
        "the photo of a", "a bright photo of a", "a dark photo of the", "a good photo of a", "a photo of one",
        "a depiction of a", "a photo of the", "a clean picture of the", "a small picture of the",
    )
)  # fmt: skip
STYLE = tuple(
    f"{before} in the style of {NAME}"
    for before in (
        "a painting", "a picture", "a rendering", "a cropped painting", "the painting", "a bright painting",
        "a dark painting", "a close-up painting", "a good painting", "a rendition", "a nice picture", "a small picture",
    )
)  # fmt: skip


def read(text: str) -> tuple[str, ...]:
    """The templates of "subject", of "style", or in the lines of a file; none for "".

    Raises RequestError or FileError.
    """
    if not text:
        return ()
    if text in ("subject", "style"):
        return SUBJECT if text == "subject" else STYLE
    path = Path(text)
    if not path.is_file() and path.suffix == "":
        raise RequestError("data.template", f"{printable(text, 60)!r} is not known; use subject, style, or a text file")
    lines = tuple(line for line in map(str.strip, read_text(path).splitlines()) if line)
    if not lines:
        raise FileError(path, f"has no lines; each is a caption with {NAME} and {FILEWORDS}")
    return lines


def fill(template: str, caption: str) -> str:
    """`template`, which has its word, with the caption in it."""
    return template.replace(FILEWORDS, caption).strip(" ,")
