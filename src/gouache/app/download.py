"""Downloads one file from a URL into a folder; an interrupted download is resumed.

    FOLDER/data.part      the bytes received so far
    FOLDER/source.json    the URL, the size, and the validator (ETag or date) of the version that they belong to

A broken connection is resumed where it broke, and so is a download that was stopped with Ctrl-C or killed. The whole
file is requested again if it has changed on the server, or if the server does not support ranges.
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
from gouache.outside import parse_json, read_outside
from gouache.version import __version__

_CHUNK = 1 << 20
_MAX_FAILURES = 4  # in a row, without a byte received
_RESERVE = 100_000_000  # bytes to leave free on the disk

OnWork = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Version:
    """The file as the server describes it: `size` in bytes, 0 if unknown; `validator` "" if there is none."""

    url: str
    name: str
    size: int
    validator: str


def download(
    url: str, folder: Path, *, token: str = "", on_work: OnWork | None = None, pause: float = 1.0
) -> tuple[Path, str]:
    """Download `url` into `folder`. Returns (the file, the name that the server or the URL gives it).

    `token` is sent as a bearer token, to the host of `url` only. After a failure it waits `pause` seconds, after each
    further one twice as long. Raises RequestError if the server refuses or sends something other than a file;
    FileError for a full disk or a connection that keeps failing: the bytes received so far are kept.
    """
    _check_url(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"the folder cannot be created: {error.strerror}") from None
    part, failures = folder / "data.part", 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            version = _resume(url, folder, part, token, on_work)
            return part, version.name
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429:
                raise RequestError("source", _refusal(url, error)) from None
            received = part.stat().st_size if part.exists() else 0
            if not received and _is_unreachable(error):  # no network: waiting does not help
                raise FileError(without_query(url), f"cannot be downloaded: {_reason(error)}") from None
            failures = 1 if received > before else failures + 1
            if failures >= _MAX_FAILURES:
                kept = f"; {size_text(received)} are kept, run the same command again to resume" if received else ""
                raise FileError(without_query(url), f"cannot be downloaded: {_reason(error)}{kept}") from None
            time.sleep(pause * 2 ** (failures - 1))


def _resume(url: str, folder: Path, part: Path, token: str, on_work: OnWork | None) -> _Version:
    """Download all missing bytes. Errors of the connection are raised as they are."""
    stored = _stored_version(folder, url)
    have = part.stat().st_size if stored and part.is_file() else 0
    if stored is not None and stored.size and have == stored.size:
        return stored
    request = urllib.request.Request(
        url, headers={"User-Agent": f"gouache/{__version__}", "Accept-Encoding": "identity"}
    )
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if have and stored is not None and stored.validator:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", stored.validator)
    with _OPENER.open(request, timeout=30) as response:
        begin = _range_start(response.headers) if response.status == 206 else 0
        if begin not in (0, have):
            raise http.client.HTTPException(f"the server sent bytes from {begin}, but those from {have} were requested")
        version = _version(url, response.url, response.headers, begin)
        _check_content_type(url, response.headers)
        _check_disk_space(folder, version.size - begin)
        write_atomic(folder / "source.json", json.dumps(asdict(version)).encode())
        if not begin:
            part.unlink(missing_ok=True)  # whatever has that name: a named pipe would block
        with part.open("r+b" if begin else "xb") as file:
            file.seek(begin)
            done = begin
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if on_work is not None:
                    on_work("downloading", done, version.size or done)
    if version.size and done != version.size:
        raise http.client.IncompleteRead(b"", version.size - done)
    return version


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another URL only if that is http or https too."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError("source", f"{without_query(url)!r} is not a web address; expected https://...")


def without_query(url: str) -> str:
    """`url` up to the "?": the part after it can hold a token."""
    return printable(url.split("?")[0])


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    answer = f"{without_query(url)}: the server answers {error.code} {printable(str(error.reason), 80)}"
    if error.code in (401, 403):
        return f"{answer}; it requires a login: create a token on its site and give it with --token or GOUACHE_TOKEN"
    return f"{answer}; check that this is the address of the file itself"


def _is_unreachable(error: Exception) -> bool:
    """Whether no connection was made at all: an unknown host, no network, a refused connection."""
    cause = getattr(error, "reason", error)
    return (
        isinstance(error, urllib.error.URLError)
        and isinstance(cause, OSError)
        and not isinstance(cause, ConnectionResetError)
        and not isinstance(error, urllib.error.HTTPError)
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {printable(str(error.reason), 80)}"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended before the end of the file"
    return printable(str(getattr(error, "reason", error)) or type(error).__name__)


def _stored_version(folder: Path, url: str) -> _Version | None:
    """The version that an interrupted download of the same URL belongs to."""
    with suppress(FileError, OSError, ValueError, TypeError):
        version = _Version(**parse_json(read_outside(folder / "source.json")))
        if version.url == url:
            return version
    return None


def _version(url: str, final_url: str, headers: Message, begin: int) -> _Version:
    length = headers.get("Content-Length", "")
    size = begin + int(length) if length.isdecimal() else 0
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")  # W/: a weak ETag
    return _Version(url, _file_name(url, final_url, headers), size, validator)


def _range_start(headers: Message) -> int:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def _file_name(url: str, final_url: str, headers: Message) -> str:
    """The name from the server, else the last part of the URL; without characters that a file name must not have."""
    sent = headers.get_filename() or ""
    for name in (sent, *(urllib.parse.unquote(urllib.parse.urlsplit(each).path) for each in (url, final_url))):
        last = re.split(r"[/\\]", name)[-1]
        clean = "".join(each if each.isprintable() else "_" for each in re.sub(r'[<>:"|?*]', "_", last))
        clean = clean.strip(". ").lstrip("-. ")
        if clean:
            return clean[:200]
    return "model"


def _check_content_type(url: str, headers: Message) -> None:
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise RequestError("source", f"{without_query(url)} is a web page; give the address of the file it links to")


def _check_disk_space(folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if missing + _RESERVE > free:
        raise FileError(folder, f"not enough disk space: {size_text(missing)} to download, {size_text(free)} free")
