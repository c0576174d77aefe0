"""Writing: names are claimed exclusively, stated hashes are those of the weights, bad targets are refused early."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gouache.errors import DamagedFile, FileError, GouacheError, NotAModel, RequestError
from gouache.workshop import save
from gouache.workshop.convert import convert
from gouache.workshop.embedding import combine
from gouache.workshop.lora import bake, change
from gouache.workshop.lora.extract import extract
from gouache.workshop.lora.factors import Size
from gouache.workshop.merge import merge
from gouache.workshop.prune import prune
from gouache.workshop.recipe import Recipe, Source
from gouache.workshop.vae import bake as bake_vae
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]
Work = Callable[[Path], object]

# ---- hashes in metadata


def data_hash(path: Path) -> str:
    """The SHA-256 of the bytes after the header, by the definition of the format."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def with_hashes(source: Path, path: Path) -> Path:
    """A copy of `source` whose metadata has its hashes, as kohya's scripts write them."""
    tensors = load_file(source)
    with safe_open(source, "pt") as opened:
        kept = opened.metadata() or {}
    save_file(tensors, path, kept)
    digest = data_hash(path)
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}", "sshs_legacy_hash": "01234567"}
    save_file(tensors, path, {**kept, **hashes, "ss_steps": "5"})
    assert data_hash(path) == digest
    return path


@pytest.fixture(scope="module")
def hashed(narrow: Narrows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, a VAE, two LoRAs and an embedding; all but the second model with hashes."""
    folder = tmp_path_factory.mktemp("hashed")

    def change_all(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if tensors[name].is_floating_point()]:
            tensors[name] = tensors[name] * 1.25 + 0.01

    model = with_hashes(narrow("sd1").file, folder / "model.safetensors")
    tuned = altered(narrow("sd1").file, folder / "tuned.safetensors", change_all)
    extract(tuned, model, folder / "l.safetensors", Size(4))
    convert(tuned, folder / "v.safetensors", only="vae")
    save_file({"emb_params": torch.randn(2, 64)}, folder / "e.safetensors")
    return {
        "model": model, "tuned": tuned, "lora": with_hashes(folder / "l.safetensors", folder / "lora.safetensors"),
        "vae": with_hashes(folder / "v.safetensors", folder / "vae.safetensors"),
        "embedding": with_hashes(folder / "e.safetensors", folder / "embedding.safetensors"),
    }  # fmt: skip


CHANGES: dict[str, Callable[[dict[str, Path], Path], object]] = {
    "convert": lambda files, out: convert(files["model"], out),
    "convert --dtype": lambda files, out: convert(files["model"], out, dtype="bf16"),
    "convert --dtype of a LoRA": lambda files, out: convert(files["lora"], out, dtype="bf16"),
    "convert --only": lambda files, out: convert(files["model"], out, only="unet"),
    "prune --dtype": lambda files, out: prune(files["model"], out, dtype="fp16"),
    "prune --drop": lambda files, out: prune(files["model"], out, drop=("vae",)),
    "merge": lambda files, out: merge(Recipe(models=(Source(str(files["model"])), Source(str(files["tuned"])))), out),
    "lora bake": lambda files, out: bake.bake(files["model"], [(files["lora"], 1.0)], out),
    "lora resize": lambda files, out: change.resize(files["lora"], out, Size(2)),
    "lora merge": lambda files, out: change.merge([(files["lora"], 1.0), (files["lora"], 0.5)], out),
    "lora extract": lambda files, out: extract(files["model"], files["tuned"], out, Size(4)),
    "vae bake": lambda files, out: bake_vae(files["model"], files["vae"], out),
    "embedding merge": lambda files, out: combine([(files["embedding"], 1.0), (files["embedding"], 0.5)], out),
}


def stated(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata() or {}
    return {key: value for key, value in metadata.items() if key in save.HASH_KEYS}


@pytest.mark.parametrize("name", CHANGES)
def test_no_written_file_states_a_hash_of_other_weights(hashed: dict[str, Path], tmp_path: Path, name: str):
    out = tmp_path / "out.safetensors"

    CHANGES[name](hashed, out)

    digest, found = data_hash(out), stated(out)
    assert found.get("sshs_model_hash", digest) == digest
    assert found.get("modelspec.hash_sha256", f"0x{digest}") == f"0x{digest}"
    assert ("sshs_legacy_hash" in found) == (name == "convert"), "it depends on more than the weights"


def test_a_plain_conversion_keeps_the_hashes_and_a_cast_makes_them_anew(hashed: dict[str, Path], tmp_path: Path):
    convert(hashed["lora"], tmp_path / "same.safetensors")
    convert(hashed["lora"], tmp_path / "cast.safetensors", dtype="bf16")

    assert stated(tmp_path / "same.safetensors") == stated(hashed["lora"])
    digest = data_hash(tmp_path / "cast.safetensors")
    assert stated(tmp_path / "cast.safetensors") == {
        "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}",
    }  # fmt: skip


def test_hashes_through_a_folder_and_back_are_those_of_the_result(hashed: dict[str, Path], tmp_path: Path):
    convert(hashed["model"], tmp_path / "folder", dtype="fp16")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")

    assert stated(tmp_path / "back.safetensors")["sshs_model_hash"] == data_hash(tmp_path / "back.safetensors")


@pytest.mark.parametrize("text", ["", "x", "0" * 64, "ÄÖ"])
def test_hashes_that_were_wrong_before_are_right_afterwards(tmp_path: Path, text: str):
    tensors = {"b": torch.randn(3), "a": torch.randn(2).half(), "c": torch.arange(4)}
    save_file(tensors, tmp_path / "a.safetensors", {"sshs_model_hash": text, "sshs_legacy_hash": text})

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")

    assert stated(tmp_path / "b.safetensors") == {"sshs_model_hash": data_hash(tmp_path / "b.safetensors")}


# ---- names


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(4)}, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_name_that_another_program_takes_meanwhile_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, links: bool
):
    """The other program writes its file after the check of the target and before the end of the work."""
    out = tmp_path / f"out{ending}"
    if not links:  # as on FAT

        def no_link(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        real = os.link
        monkeypatch.setattr(os, "link", lambda a, b, **rest: real(a, b, **rest) if rest else no_link())

    def take(*_: object) -> None:
        out.write_bytes(b"theirs")

    with pytest.raises(RequestError, match=f"out{ending} already exists; choose another name, or add --overwrite"):
        convert(source, out, on_work=take)
    assert out.read_bytes() == b"theirs" and not litter(tmp_path)

    out.unlink()
    convert(source, out)
    assert out.stat().st_size > 0 and not litter(tmp_path)


def test_a_folder_that_another_program_makes_meanwhile_is_refused(narrow: Narrows, tmp_path: Path):
    out = tmp_path / "out"

    def take(*_: object) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_bytes(b"theirs")

    with pytest.raises(RequestError, match="already exists"):
        convert(narrow("sd1").file, out, on_work=take)

    assert [path.name for path in out.iterdir()] == ["theirs"] and not litter(tmp_path)


def test_of_two_conversions_to_one_name_exactly_one_succeeds(tmp_path: Path):
    import multiprocessing

    for number in range(2):
        save_file({"a": torch.full((1000,), float(number))}, tmp_path / f"{number}.safetensors")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(
            _converted, [(tmp_path / f"{n}.safetensors", tmp_path / "out.safetensors") for n in (0, 1)]
        )

    assert sorted(results) == ["", "exists"]
    assert load_file(tmp_path / "out.safetensors")["a"][0] == results.index("")


def _converted(source: Path, target: Path) -> str:
    try:
        convert(source, target)
    except RequestError as error:
        return "exists" if "already exists" in str(error) else str(error)
    return ""


def test_overwrite_replaces_a_file_and_keeps_it_if_the_work_fails(source: Path, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, overwrite=True, on_work=fail)
    assert out.read_bytes() == b"mine" and not litter(tmp_path)

    convert(source, out, overwrite=True)
    assert load_file(out).keys() == {"a"}


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "convert": convert,
    "convert to a folder": lambda source, out: convert(source, out.with_suffix("")),
    "prune": prune,
    "merge": lambda source, out: merge(Recipe(models=(Source(str(source)),) * 2), out),
    "merge's recipe": lambda source, out: merge(
        Recipe(models=(Source(str(source)),) * 2), source.with_name("good.safetensors"), recipe_file=out
    ),
    "vae bake": lambda source, out: bake_vae(source, source, out),
    "lora bake": lambda source, out: bake.bake(source, [(source, 1.0)], out),
    "lora resize": lambda source, out: change.resize(source, out, Size(4)),
    "lora merge": lambda source, out: change.merge([(source, 1.0)] * 2, out),
    "lora extract": lambda source, out: extract(source, source, out, Size(4)),
    "lora rename": lambda source, out: change.rename(source, out, "peft"),
    "embedding merge": lambda source, out: combine([(source, 1.0)] * 2, out),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 500, "cannot be written: File name too long"),
        ("no/such/folder/a", "cannot be written: its folder does not exist"),
        ("source.safetensors/a", "cannot be written: "),
        ("nul\0", "is not a possible file name"),
    ],
)
def test_an_impossible_target_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, name: str, words: str
):
    monkeypatch.setattr("gouache.workshop.layout.open_model", lambda path: pytest.fail("the source was read"))

    with pytest.raises(FileError, match=words) as caught:
        WRITERS[writer](source, tmp_path / f"{name}.safetensors")

    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_protected_folder_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "there")
    (tmp_path / "there").mkdir()

    with pytest.raises(FileError, match="cannot be written: its folder is write-protected"):
        WRITERS[writer](source, tmp_path / "there" / "a.safetensors")


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "convert to a folder"])
def test_an_existing_target_is_refused_before_the_work(source: Path, tmp_path: Path, writer: str):
    out = tmp_path / "there.safetensors"
    out.write_bytes(b"mine")

    with pytest.raises(RequestError, match=r"there\.safetensors already exists"):
        WRITERS[writer](source, out)

    assert out.read_bytes() == b"mine"


def test_a_full_disk_names_the_target_and_leaves_nothing(
    narrow: Narrows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A limit on the size of files stands in for a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("out.safetensors", "out.ckpt", "folder"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(FileError, match="cannot be written: ") as caught:
                convert(narrow("sd1").file, tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and ".gouache" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_a_failed_check_names_the_target(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save, "_same_bits", lambda a, b: False)

    with pytest.raises(DamagedFile, match="verification failed: a differs") as caught:
        convert(source, tmp_path / "out.safetensors")

    assert caught.value.path == tmp_path / "out.safetensors" and not (tmp_path / "out.safetensors").exists()


def test_the_reserve_of_a_folder_is_stated(narrow: Narrows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))  # type: ignore[attr-defined]

    with pytest.raises(FileError, match="and 16 MB that stay free, and only 10 MB are free"):
        convert(narrow("sd1").file, tmp_path / "folder")


# ---- one verdict


@pytest.mark.parametrize("writer", [name for name in WRITERS if not name.startswith(("lora r", "lora m", "emb"))])
def test_a_file_without_tensors_is_no_model_for_any_command(tmp_path: Path, writer: str):
    for path, make in (
        (tmp_path / "a.safetensors", lambda path: save_file({}, path, {"a": "b"})),
        (tmp_path / "a.pt", lambda path: path.write_bytes(b"\x80\x02K\x05.")),
    ):
        make(path)
        with pytest.raises(GouacheError) as caught:
            WRITERS[writer](path, tmp_path / "out.safetensors")
        assert isinstance(caught.value, NotAModel) or "holds no tensors" in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()
