"""What pictures contain, compared with hashes made here, and the cache."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from gouache.data import contents as module
from gouache.data.contents import contents, hashes, look_of, sizes
from gouache.errors import RequestError

from .pictures import photo


def bits_apart(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_the_difference_hash_is_that_of_its_definition():
    picture = photo(1)
    small = picture.convert("L").resize((9, 8), Image.Resampling.LANCZOS)
    bits = "".join(
        "1" if small.getpixel((x + 1, y)) > small.getpixel((x, y)) else "0" for y in range(8) for x in range(8)
    )
    assert look_of(picture) == int(bits, 2)
    ramp = Image.linear_gradient("L").rotate(90)
    assert look_of(ramp) == 2**64 - 1 and look_of(ImageOps.mirror(ramp)) == 0


def test_copies_look_alike_and_other_pictures_do_not(tmp_path: Path):
    for seed in range(20):
        picture = photo(seed)
        picture.save(tmp_path / "a.jpg", quality=60)
        picture.resize((96, 72)).save(tmp_path / "b.webp")
        ImageOps.mirror(picture).save(tmp_path / "c.png")
        photo(seed + 100).save(tmp_path / "d.png")
        jpeg, small, mirror, other = contents([tmp_path / name for name in ("a.jpg", "b.webp", "c.png", "d.png")])

        look = look_of(picture)
        assert max(bits_apart(look, jpeg.look), bits_apart(look, small.look)) <= 4
        assert bits_apart(look, mirror.mirrored) <= 4
        assert min(bits_apart(look, other.look), bits_apart(look, other.mirrored)) > 12


def test_sizes_and_hashes_are_those_of_the_files_in_order(tmp_path: Path):
    paths = [tmp_path / f"{number}.png" for number in range(30)]
    for number, path in enumerate(paths):
        Image.new("RGB", (10 + number, 20)).save(path)

    assert sizes(paths) == [(10 + number, 20) for number in range(30)]
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert hashes(paths) == expected
    assert [each.sha256 for each in contents(paths)] == expected


def test_a_picture_that_cannot_be_read_is_an_error_for_itself_alone(tmp_path: Path):
    good, bad, pipe = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    photo(1).save(good)
    bad.write_bytes(good.read_bytes()[:400])
    os.mkfifo(pipe)

    found = contents([good, bad, pipe, tmp_path / "none.png"], tmp_path / "cache")
    assert [isinstance(each, RequestError) for each in found] == [False, True, True, True]
    for read in (sizes, hashes):
        with pytest.raises(RequestError, match="not a regular file"):
            read([good, pipe])


def test_unchanged_files_are_not_read_again_and_changed_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache, a, b = tmp_path / "new" / "cache", tmp_path / "a.png", tmp_path / "b.png"
    photo(1).save(a)
    photo(2).save(b)
    read, original = list[Path](), module.pixels.read_bytes

    def counting(path: Path, setting: str) -> bytes:
        read.append(path)
        return original(path, setting)

    monkeypatch.setattr(module.pixels, "read_bytes", counting)
    first = contents([a, b], cache)
    assert contents([b, a], cache) == first[::-1] and sorted(read) == [a, b]

    status = a.stat()
    photo(3).save(b)
    os.utime(a, ns=(status.st_atime_ns, status.st_mtime_ns))  # a touch changes the time of change alone
    b.replace(tmp_path / "c.png")
    (tmp_path / "c.png").replace(b)
    read.clear()
    changed = contents([a, b], cache)
    assert changed[0] == first[0] and changed[1] != first[1] and b in read
    read.clear()
    assert hashes([a, b], cache) == [each.sha256 for each in changed]
    assert hashes([a, b], cache) == [each.sha256 for each in changed] and sorted(read) == [a, b]


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b'[1,2]\nnull\n[[],1]\n["a"\n', b'["content|a", [1]]\n'])
def test_a_damaged_cache_is_made_again(damage: bytes, tmp_path: Path):
    cache, path = tmp_path / "cache", tmp_path / "a.png"
    photo(1).save(path)
    expected = contents([path])
    cache.write_bytes(damage)
    assert contents([path], cache) == expected and contents([path], cache) == expected

    key, _ = json.loads(cache.read_text().splitlines()[-1])
    cache.write_text(json.dumps([key, ["0" * 64, 1, 2, 3, -4]]) + "\n")
    assert contents([path], cache) == expected


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path):
    path = tmp_path / "a.png"
    photo(1).save(path)
    assert contents([path], path / "cache") == contents([path])


def test_many_pictures_are_listed_quickly(tmp_path: Path):
    photo(1, (512, 512)).save(tmp_path / "a.png")
    paths = [tmp_path / f"{number}.png" for number in range(2000)]
    for path in paths:
        path.hardlink_to(tmp_path / "a.png")

    started = time.perf_counter()
    assert sizes(paths) == [(512, 512)] * 2000
    assert time.perf_counter() - started < 10  # so 20,000 within 100 s even on a busy machine


def test_work_that_ends_early_leaves_no_thread(tmp_path: Path):
    """A half-used pool that the garbage collector ends can block for ever."""
    before, paths = set(threading.enumerate()), [tmp_path / f"{number}" for number in range(40)]
    for path in paths[1:]:
        photo(1).save(path, "PNG")

    with pytest.raises(RequestError) as caught:
        sizes(paths)
    with pytest.raises(KeyboardInterrupt):
        contents(paths, on_work=lambda what, done, total: interrupt())

    assert caught.value.__traceback__ is not None and set(threading.enumerate()) <= before


def interrupt() -> None:
    raise KeyboardInterrupt
