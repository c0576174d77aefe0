"""One file from a URL into a folder, in any number of sittings.

    PLACE/data.part      what is there so far
    PLACE/source.json    where it is from, how large it is to be, and the validator (ETag or date) of that version

A connection that breaks is taken up again where it broke; so is the next call after Ctrl-C or a kill. A server whose
file has changed meanwhile, or that cannot send parts, is asked for the whole.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from gouache.errors import FileError, RequestError, printable
from gouache.files.source import size_text
from gouache.files.write import write_atomic
from gouache.version import __version__

_PIECE = 1 << 20
_TRIES = 4  # in a row without a byte
_SPARE = 100_000_000  # bytes to leave free on the disk

OnWork = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Version:
    """What the server said of the file: `size` in bytes, 0 where it does not tell; `validator` "" likewise."""

    url: str
    name: str
    size: int
    validator: str


def download(
    url: str, place: Path, *, token: str = "", on_work: OnWork | None = None, pause: float = 1.0
) -> tuple[Path, str]:
    """Fetch `url` into the folder `place`; (the file, the name that the server or the URL gives it).

    `token` is sent to the host of `url` alone, as a bearer. `pause` seconds pass after a failure, twice as many after
    the next. Raises RequestError where the server refuses or sends something else than a file; FileError for a full
    disk, or a connection that stays broken: what has come so far is kept.
    """
    _check(url)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(place, f"cannot be made: {error.strerror}") from None
    part, failures = place / "data.part", 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            version = _go_on(url, place, part, token, on_work)
            return part, version.name
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429:
                raise RequestError("source", _refusal(url, error)) from None
            came = part.stat().st_size if part.exists() else 0
            failures = 1 if came > before else failures + 1
            if failures >= _TRIES:
                kept = f"; {size_text(came)} are kept, the same command goes on from there" if came else ""
                raise FileError(without_query(url), f"cannot be fetched: {_reason(error)}{kept}") from None
            time.sleep(pause * 2 ** (failures - 1))


def _go_on(url: str, place: Path, part: Path, token: str, on_work: OnWork | None) -> _Version:
    """Fetch what is missing, all of it; raises whatever breaks the connection."""
    known = _known(place, url)
    have = part.stat().st_size if known and part.exists() else 0
    if known is not None and known.size and have == known.size:
        return known
    request = urllib.request.Request(
        url, headers={"User-Agent": f"gouache/{__version__}", "Accept-Encoding": "identity"}
    )
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if have and known is not None and known.validator:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known.validator)
    with _OPENER.open(request, timeout=30) as answer:
        begin = _begin(answer.headers) if answer.status == 206 else 0
        if begin not in (0, have):
            raise http.client.HTTPException(f"the server sent bytes from {begin} on, asked for those from {have} on")
        version = _version(url, answer.url, answer.headers, begin)
        _check_kind(url, answer.headers)
        _check_room(place, version.size - begin)
        write_atomic(place / "source.json", json.dumps(asdict(version)).encode())
        with part.open("r+b" if begin else "wb") as file:
            file.seek(begin)
            done = begin
            while piece := answer.read(_PIECE):
                file.write(piece)
                done += len(piece)
                if on_work is not None:
                    on_work("fetching", done, version.size or done)
    if version.size and done != version.size:
        raise http.client.IncompleteRead(b"", version.size - done)
    return version


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A server may send us to another address, never to another protocol than the web's."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


def _check(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError("source", f"{without_query(url)!r} is no address on the web; expected https://...")


def without_query(url: str) -> str:
    """Without what stands behind ?, where some sites want a password."""
    return printable(url.split("?")[0])


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    said = f"{without_query(url)}: the server answers {error.code} {printable(str(error.reason), 80)}"
    if error.code in (401, 403):
        return f"{said}; it wants a login: make a token on its site and give it by --token or GOUACHE_TOKEN"
    return f"{said}; look whether the address is that of the file itself"


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {printable(str(error.reason), 80)}"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ends before the file does"
    return printable(str(getattr(error, "reason", error)) or type(error).__name__)


def _known(place: Path, url: str) -> _Version | None:
    """What an earlier sitting was told of the same address."""
    with suppress(OSError, ValueError, TypeError):
        version = _Version(**json.loads((place / "source.json").read_text(encoding="utf-8")))
        if version.url == url:
            return version
    return None


def _version(url: str, final: str, headers: Message, begin: int) -> _Version:
    length = headers.get("Content-Length", "")
    size = begin + int(length) if length.isdecimal() else 0
    strong = headers.get("ETag", "")
    validator = strong if strong and not strong.startswith("W/") else headers.get("Last-Modified", "")
    return _Version(url, _name(url, final, headers), size, validator)


def _begin(headers: Message) -> int:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def _name(url: str, final: str, headers: Message) -> str:
    """What the server calls the file, else the last word of the address; harmless as a file's name."""
    told = headers.get_filename() or ""
    for name in (told, *(urllib.parse.unquote(urllib.parse.urlsplit(each).path) for each in (url, final))):
        last = re.split(r"[/\\]", name)[-1]
        clean = re.sub(r'[<>:"|?*\x00-\x1f\x7f]', "_", last).strip(". ")
        if clean:
            return clean[:200]
    return "model"


def _check_kind(url: str, headers: Message) -> None:
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise RequestError(
            "source", f"{without_query(url)} is a web page; give the address of the file that it links to"
        )


def _check_room(place: Path, more: int) -> None:
    free = shutil.disk_usage(place).free
    if more + _SPARE > free:
        raise FileError(place, f"has no room: {size_text(more)} are to come, and {size_text(free)} are free there")
