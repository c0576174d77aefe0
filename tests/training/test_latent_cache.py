"""The latent cache: never out of date, never damaged, whatever happens to its files or its process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gouache.data.buckets import cover
from gouache.data.pictures import Examined, View
from gouache.errors import FileError
from gouache.training import cache_file
from gouache.training.latent_cache import LatentCache, identity_of

from .data_sets import Encoders

CONTENT = Examined("ab" * 32, (100, 64))
VIEW = View(cover((100, 64), (64, 64)))


def picture(seed: int = 0, size: int = 64) -> torch.Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    return LatentCache(tmp_path, "vae", Encoders().picture)


def equal(one, two) -> bool:
    return one is not None and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


def test_an_entry_is_read_back_bit_for_bit(cache: LatentCache, tmp_path: Path):
    key = cache.key(CONTENT, VIEW)
    mask = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2))
    assert key not in cache and cache.read(key) is None

    made = cache.make(key, picture(), mask)

    assert key in cache
    assert equal(LatentCache(tmp_path, "vae", Encoders().picture).read(key), made)
    assert torch.equal(made["latents"], Encoders().picture(picture()[None])[0])
    assert torch.allclose(made["mask"], mask.reshape(1, 8, 8, 8, 8).mean((2, 4)), atol=1e-6)


def test_without_a_folder_nothing_is_kept():
    cache = LatentCache(None, "vae", Encoders().picture)
    key = cache.key(CONTENT, VIEW)

    assert "latents" in cache.make(key, picture(), None)
    assert key not in cache and cache.read(key) is None


def test_a_key_depends_on_content_view_autoencoder_and_mask_number(cache: LatentCache):
    views = [
        VIEW,
        replace(VIEW, flip=True),
        replace(VIEW, alpha_mask=True),
        replace(VIEW, color=(1.0, 1.0, 1.0, 0.01)),
        View(replace(VIEW.crop, offset=(3, 0))),
        View(cover((100, 64), (72, 56))),
    ]
    keys = {cache.key(CONTENT, view) for view in views}
    keys |= {cache.key(CONTENT, VIEW, hole) for hole in range(3)}
    keys |= {cache.key(replace(CONTENT, digest="cd" * 32), VIEW)}
    keys |= {LatentCache(None, "another", Encoders().picture).key(CONTENT, VIEW)}

    assert len(keys) == len(views) + 5
    assert cache.key(CONTENT, View(cover((100, 64), (64, 64)))) in keys


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\1" + path.read_bytes()[-8:]),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        lambda path: path.write_bytes(path.read_bytes().replace(b"latents", b"patents")),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["empty", "shortened", "a byte changed", "zeros", "renamed tensor", "a pipe"],
)
def test_a_damaged_entry_is_missing_and_made_again(cache: LatentCache, tmp_path: Path, damage):
    key = cache.key(CONTENT, VIEW)
    made = cache.make(key, picture(), None)
    (path,) = files(tmp_path)

    damage(path)
    assert cache.read(key) is None

    if path.is_file():
        cache.make(key, picture(), None)
        assert equal(cache.read(key), made)


def test_the_file_of_another_entry_is_not_taken_for_this_one(cache: LatentCache, tmp_path: Path):
    one, two = cache.key(CONTENT, VIEW), cache.key(CONTENT, replace(VIEW, flip=True))
    cache.make(one, picture(), None)
    (path,) = files(tmp_path)
    target = tmp_path / two[:2] / f"{two}.safetensors"
    target.parent.mkdir(exist_ok=True)
    shutil.copy(path, target)

    assert cache.read(two) is None


def write_many(folder: Path) -> None:
    cache = LatentCache(folder, "vae", Encoders().picture)
    for number in itertools.count():
        cache.make(cache.key(replace(CONTENT, digest=str(number)), VIEW), picture(number), None)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_killed_while_it_writes_leaves_no_damaged_entry(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_latent_cache"])
    delays = random.Random(0)
    for _ in range(6):
        child = context.Process(target=write_many, args=(tmp_path,))
        child.start()
        before, deadline = len(files(tmp_path)), time.monotonic() + 60
        while len(files(tmp_path)) < before + 2 and time.monotonic() < deadline and child.is_alive():
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.02))
        child.kill()
        child.join()

    cache = LatentCache(tmp_path, "vae", Encoders().picture)
    found = [path for path in files(tmp_path) if path.suffix == ".safetensors"]
    assert len(found) >= 2
    for path in found:
        assert cache.read(path.stem) is not None


def test_a_full_disk_is_one_line(cache: LatentCache, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))

    with pytest.raises(FileError, match=r"cannot be written: it needs \d+ bytes, but only 1000 bytes are free there"):
        cache.make(cache.key(CONTENT, VIEW), picture(), None)


def test_contents_of_pictures_are_kept_and_damage_is_ignored(cache: LatentCache, tmp_path: Path):
    one, two = Examined("a", (3, 4)), Examined("b", (5, 6), 0.25)
    assert cache.contents() == {}
    cache.keep_contents([one])
    cache.keep_contents([two])
    assert cache.contents() == {"a": one, "b": two}

    for damaged in ('{"a": [3', '{"a": 3}', "[1]", '{"a": ["x", 2, null]}', '{"a": [1, 2, "x"]}', "\xff"):
        (tmp_path / "contents.json").write_text(damaged, encoding="latin-1")
        assert cache.contents() == {}


def test_the_size_of_entries_is_known_beforehand(cache: LatentCache, tmp_path: Path):
    def written(key: str) -> int:
        return (tmp_path / key[:2] / f"{key}.safetensors").stat().st_size

    key, hole = cache.key(CONTENT, VIEW), cache.key(CONTENT, VIEW, 0)
    cache.make(key, picture(), None)
    assert abs(written(key) - cache.nbytes((64, 64))) < 300
    cache.make(key, picture(), torch.ones(1, 64, 64))
    assert abs(written(key) - cache.nbytes((64, 64), mask=True)) < 300
    cache.make_concat(hole, picture(), torch.ones(1, 64, 64))
    assert abs(written(hole) - cache.nbytes((64, 64), concat=True)) < 300


def test_the_identity_of_networks_is_that_of_their_weights_and_facts():
    def net(change: float = 0.0) -> nn.Module:
        net = nn.Linear(3, 2)
        with torch.no_grad():
            net.weight.fill_(0.5)
            net.bias.fill_(0.25)
            net.weight[1, 2] += change
        return net

    same = identity_of({"a": net()}, clip_skip=2)

    assert same == identity_of({"a": net()}, clip_skip=2)
    assert len({
        same,
        identity_of({"a": net(1e-7)}, clip_skip=2),
        identity_of({"a": net().bfloat16()}, clip_skip=2),
        identity_of({"b": net()}, clip_skip=2),
        identity_of({"a": net()}, clip_skip=1),
        identity_of({"a": net()}),
    }) == 6  # fmt: skip


def test_a_file_of_many_entries_is_read_by_key(tmp_path: Path):
    entries = {name: {"x": torch.randn(3), "y": torch.arange(number)} for number, name in enumerate("abc", 1)}
    cache_file.write(tmp_path / "new" / "file.safetensors", entries)

    file = cache_file.open_entries(tmp_path / "new" / "file.safetensors")

    assert file is not None and set(file.metadata) == set(entries)
    assert all(equal(cache_file.read(file, key), entry) for key, entry in entries.items())
    assert cache_file.read(file, "d") is None
