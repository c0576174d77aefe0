"""Tar shards as a data set: what is in them, what of them is refused, filters and patterns."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gouache.data import scores, shards, tar_headers
from gouache.data.folders import read
from gouache.data.members import Member, read_bytes
from gouache.data.record import Record
from gouache.data.shard_index import ShardIndex, index
from gouache.data.shard_records import ShardRecords
from gouache.data.split import split_by_digest
from gouache.data.subset import Subset
from gouache.errors import FileError, RequestError

from .tars import encoded, write

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_headers_are_those_that_tarfile_reads(members: list[tuple[str, bytes]], format: int):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # ustar has no longer names
                return
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    found = [(each.name, each.offset, each.length) for each in tar_headers.entries(io.BytesIO(data), len(data))]
    assert found == expected and len(found) == len(members)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_tars_end_with_one_line_or_are_read_within_the_file(data: st.DataObject):
    tar = bytearray(_tar({"a.png": b"1" * 700, "b" * 200 + ".txt": b"2"}))
    for _ in range(data.draw(st.integers(1, 4))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    whole = bytes(tar[: data.draw(st.integers(0, len(tar)))])
    try:
        for entry in tar_headers.entries(io.BytesIO(whole), len(whole)):
            assert 0 <= entry.offset <= entry.offset + entry.length <= len(whole)
    except tar_headers.DamagedTar as error:
        assert "\n" not in str(error)


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def both(path: Path, **options) -> list[Record]:
    """The records in the list and in the stream, which must be equal but for the digest."""
    listed, streamed = read(path, **options), read(path, stream=True, **options)
    assert isinstance(streamed.records, ShardRecords) and listed.notes == streamed.notes
    plain = [shards._plain(record) for record in streamed.records]
    assert plain == list(listed.records) and [streamed.records[row] for row in range(len(plain))] != plain
    return plain


def test_samples_have_pictures_captions_masks_and_scores(tmp_path: Path):
    (red, blue), mask = (encoded(seed, (24 + seed, 16), "JPEG") for seed in range(2)), encoded(9)
    write(
        tmp_path / "a.tar",
        {
            "./x/000.jpg": red, "./x/000.txt": "a cat\n\na mat", "./x/000.mask.png": mask,
            "001.json": json.dumps({"caption": "a dog", "punsafe": 0.25, "note": "x", "key": "001"}), "001.jpg": blue,
        },
    )  # fmt: skip
    write(tmp_path / "b.tar", {"002.webp": encoded(3, (33, 20), "WEBP"), "002.cls": "7", "003.json": "{}"})
    first, second, third = both(tmp_path)

    assert [each.captions for each in (first, second, third)] == [("a cat", "a mat"), ("a dog",), ("",)]
    assert [each.name for each in (first, second, third)] == ["a.tar/./x/000.jpg", "a.tar/001.jpg", "b.tar/002.webp"]
    assert [read_bytes(each.path, "data") for each in (first, second)] == [red, blue]
    assert first.mask is not None and read_bytes(first.mask, "mask") == mask and second.mask is None
    assert first.scores == {} and second.scores == {"punsafe": 0.25}
    assert [each.path.size for each in (first, second, third) if isinstance(each.path, Member)] == [
        (24, 16), (25, 16), (33, 20)
    ]  # fmt: skip
    assert read(tmp_path).notes == ["1 sample without a picture left out"]
    assert [each.captions for each in both(tmp_path / "a.tar", caption_column="note")] == [("a cat", "a mat"), ("x",)]
    assert both(tmp_path / "a.tar", subset=Subset(trigger="sks"))[0].captions == ("sks, a cat", "sks, a mat")
    with pytest.raises(FileError, match="no JSON with 'title'; it has caption, punsafe, note, key"):
        read(tmp_path, caption_column="title")


def test_sizes_are_those_of_upright_pictures(tmp_path: Path):
    from PIL import Image

    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    write(tmp_path / "a.tar", {"0.jpg": buffer.getvalue(), "0.json": '{"width": 7, "height": 7}'})
    (record,) = both(tmp_path)
    assert isinstance(record.path, Member) and record.path.size == (20, 40)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s-{000..002}.tar", ["s-000.tar", "s-001.tar", "s-002.tar"]),
        ("s-{8..11}", ["s-8", "s-9", "s-10", "s-11"]),
        ("s-{08..11}", ["s-08", "s-09", "s-10", "s-11"]),
        ("{a,bc}-{1..0}.tar", ["a-1.tar", "a-0.tar", "bc-1.tar", "bc-0.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_expanded_as_by_a_shell(pattern: str, names: list[str]):
    assert shards.expand(pattern) == names


def test_a_pattern_names_its_shards_in_order(tmp_path: Path):
    for number in (8, 9, 10):
        write(tmp_path / f"set-{number:03d}.tar", {f"{number}.png": encoded(number)})
    found = both(tmp_path / "set-{008..010}.tar")
    assert [each.name for each in found] == ["set-008.tar/8.png", "set-009.tar/9.png", "set-010.tar/10.png"]
    with pytest.raises(FileError, match=r"set-011.tar: does not exist"):
        read(tmp_path / "set-{008..011}.tar")
    with pytest.raises(FileError, match="more than 100,000 shards"):
        read(tmp_path / "set-{0..999}{0..999}.tar")


def test_what_cannot_be_used_is_named_and_the_rest_is_used(tmp_path: Path):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {
            "0.png": b"no picture", "1.png": encoded(1), "1.json": b"[1]", "2.png": encoded(2), "2.txt": b"\xff",
            "3.png": encoded(3), "3.txt": b"three", "4.png": encoded(4), "4.json": b'{"caption": 4}',
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "3.png"), (tarfile.CHRTYPE, "")):
            info = tarfile.TarInfo("5.png")
            info.type, info.linkname = kind, target
            tar.addfile(info)
    (record,) = both(path)
    assert record.captions == ("three",)
    assert read(path).notes == [
        "bad.tar: 4 samples left out: 0: is not a picture that can be read; PNG, JPEG, WebP, BMP, TIFF and AVIF are; "
        "1: its JSON is not an object; 2: 2.txt is not text in UTF-8 (byte 0) and 1 more",
        "3 members of shards left out: links, devices or named pipes, which are not followed",
    ]


def test_a_shard_that_is_cut_off_is_used_up_to_there(tmp_path: Path):
    whole = write(tmp_path / "whole.tar", {f"{n}.png": encoded(n, (40, 40)) for n in range(3)})
    with tarfile.open(whole) as tar:
        middle = tar.getmembers()[2].offset_data + 100
    for length, note in (
        (middle, "cut.tar is cut off within 2.png: 2 samples before that used"),
        (middle - 612, "cut.tar is cut off: it has no end mark: 2 samples before that used"),
    ):
        cut = tmp_path / "cut" / "cut.tar"
        cut.parent.mkdir(exist_ok=True)
        cut.write_bytes(whole.read_bytes()[:length])
        assert len(both(cut.parent)) == 2 and read(cut.parent).notes == [note]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", b"<html>" * 200, "a.tar is not a tar file"),
        ("a.tar", b"", "it has less than 512 bytes"),
        ("a.tar", b"\x1f\x8b" * 400, r"is compressed \(gzip\), and shards are read at any position; decompress it"),
        ("a.tar.gz", b"\x1f\x8b" * 400, r"a.tar.gz: is compressed, and shards .* decompress it first"),
        ("a.tar", _tar({"a.txt": b"x"}), "1 sample without a picture"),
    ],
)
def test_a_folder_without_usable_shards_is_refused_in_one_line(tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileError, match=message):
        read(tmp_path)


def test_pictures_outside_of_shards_come_first(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(encoded())
    write(tmp_path / "b.tar", {"b.png": encoded(1)})
    assert [each.name for each in read(tmp_path).records] == ["a.png"]


def scored(folder: Path) -> Path:
    for number in range(2):
        keys = range(number * 4, number * 4 + 4)
        parts = {f"{n}.png": encoded(n) for n in keys} | {
            f"{n}.json": json.dumps({"punsafe": n / 10, "aesthetic": n} if n % 3 else {"caption": "x"}) for n in keys
        }
        write(folder / f"{number}.tar", dict(sorted(parts.items())))
    return folder


def test_filters_and_weights_of_a_stream_are_those_of_the_list(tmp_path: Path):
    found = [read(scored(tmp_path), stream=stream) for stream in (False, True)]
    for conditions, names in (
        (["punsafe<0.45"], ["1", "2", "4"]),
        (["PUNSAFE>=0.2", "aesthetic<=5"], ["2", "4", "5"]),
    ):
        listed, streamed = (scores.select(each, conditions) for each in found)
        assert isinstance(streamed.records, ShardRecords) and listed.notes == streamed.notes
        assert [each.name[6:-4] for each in streamed.records] == [each.name[6:-4] for each in listed.records] == names
        weights = [[each.weight for each in scores.weigh(one, "1-punsafe").records] for one in (listed, streamed)]
        assert weights[0] == weights[1] and len(set(weights[0])) == 3 and np.isclose(np.mean(weights[0]), 1)
    for wrong in ("nothing<1", "punsafe>1"):
        with pytest.raises(RequestError, match="no picture"):
            scores.select(found[1], [wrong])


def test_an_index_is_used_until_its_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shard = write(tmp_path / "a.tar", {"0.png": encoded(0), "1.png": encoded(1)})
    cache = tmp_path / "cache"
    first = index(shard, (".txt",), "", cache)
    (stored,) = cache.iterdir()
    monkeypatch.setattr("gouache.data.shard_index.entries", None)  # a second scan would call it
    again = index(shard, (".txt",), "", cache)
    assert [again.sample(row) for row in range(2)] == [first.sample(row) for row in range(2)]
    monkeypatch.undo()

    expected = first.sample(1)
    damaged = bytearray(stored.read_bytes())
    damaged[-5] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        ShardIndex(shard, bytes(damaged))
    stored.write_bytes(damaged)
    assert index(shard, (".txt",), "", cache).sample(1) == expected  # made anew
    assert index(shard, (".caption",), "", cache).digest == first.digest and len(list(cache.iterdir())) == 2

    write(shard, {"0.png": encoded(5)})
    os.utime(shard, (1, 1))
    changed = index(shard, (".txt",), "", cache)
    assert len(changed) == 1 and changed.digest != first.digest


def test_equal_pictures_are_held_out_together():
    digests = ["a", "b", "a", "c", "d", "e", "f", "b"]
    for seed in range(5):
        training, held = split_by_digest(digests, 3, seed)
        assert sorted(training + held) == list(range(8)) and len(held) == 3
        assert not {digests[row] for row in training} & {digests[row] for row in held}
    assert len({tuple(split_by_digest(digests, 3, seed)[1]) for seed in range(9)}) > 1
