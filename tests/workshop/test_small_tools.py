"""`hash`, `metadata` and `diff`, compared with other implementations and with known contents."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gouache.errors import DamagedFile, FileError, RequestError
from gouache.files.metadata import write_metadata
from gouache.files.open import open_model
from gouache.wording import plural
from gouache.workshop.convert import convert
from gouache.workshop.diff import diff, open_both
from gouache.workshop.hashes import hashes
from gouache.workshop.metadata import change
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]


def random_file(path: Path, size: int = 3_000_000) -> Path:
    tensor = torch.randn(size // 4, generator=torch.Generator().manual_seed(0))
    save_file({"b": tensor[: size // 8], "a": tensor[size // 8 :]}, path, {"one": "entry"})
    return path


# ---- hashes


def test_hashes_match_their_definitions(tmp_path: Path):
    path = random_file(tmp_path / "a.safetensors")
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")

    found = hashes(path)

    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.autov2 == found.sha256[:10]
    assert found.autov1 == hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert found.autov3 == hashlib.sha256(content[8 + header :]).hexdigest()[:12]
    assert int(found.crc32, 16) == zlib.crc32(content)


def test_a_ckpt_file_has_no_autov3(tmp_path: Path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.ckpt")

    found = hashes(tmp_path / "a.ckpt")

    assert found.autov3 == "" and found.autov1 == hashlib.sha256(b"").hexdigest()[:8]


@pytest.mark.parametrize("size", [0, 8, 9, 0x100000, 0x100010, 0x110000, 0x110001, 40_000_000])
def test_hashes_of_files_of_any_size(tmp_path: Path, size: int):
    """Pieces are read in turn; their ends, and those of the part for AutoV1, are at other places in each of these."""
    import random

    content = random.Random(size).randbytes(size)
    (tmp_path / "a.bin").write_bytes(content)
    steps: list[int] = []

    found = hashes(tmp_path / "a.bin", steps.append)

    assert found.sha256 == hashlib.sha256(content).hexdigest() and sum(steps) == size
    assert found.autov1 == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert int(found.crc32, 16) == zlib.crc32(content)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_only_regular_files_are_hashed(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, words in (("pipe", "is a named pipe"), ("endless", "is a device"), ("absent", "does not exist")):
        with pytest.raises(FileError, match=words):
            hashes(tmp_path / name)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_file_that_changes_while_it_is_hashed_is_one_error(tmp_path: Path, by: int):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(40_000_000))

    def change(_: int) -> None:
        os.truncate(path, 30_000_000 + by * 20_000_000)

    with pytest.raises(DamagedFile, match="was changed by another program while it was read"):
        hashes(path, change)


# ---- metadata


def test_only_the_metadata_changes(tmp_path: Path):
    path = random_file(tmp_path / "a.safetensors")
    before, tensors = hashes(path), load_file(path)

    change(path, path, {"modelspec.title": "a “title”", "two": "2"}, ["one"])

    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"modelspec.title": "a “title”", "two": "2"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    after = hashes(path)
    assert after.autov3 == before.autov3 and after.sha256 != before.sha256
    assert open_model(path).metadata["two"] == "2"


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_link_is_followed_and_stays_a_link(tmp_path: Path):
    real, link = random_file(tmp_path / "a.safetensors"), tmp_path / "link.safetensors"
    link.symlink_to(real)

    saved, _ = change(link, None, {"two": "2"})

    assert saved == real and link.is_symlink() and open_model(real).metadata == {"one": "entry", "two": "2"}


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_the_cache_of_hugging_face_is_not_changed(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    real, link = random_file(tmp_path / "blobs" / "0123"), tmp_path / "model.safetensors"
    link.symlink_to(real)
    before = real.read_bytes()

    with pytest.raises(RequestError, match="cache of Hugging Face"):
        change(link, None, {"two": "2"})

    assert real.read_bytes() == before


def test_another_file_is_only_replaced_on_request(tmp_path: Path):
    path, other = random_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    other.write_bytes(b"mine")

    with pytest.raises(RequestError, match="already exists; choose another name, or add --overwrite"):
        change(path, other, {"two": "2"})
    assert other.read_bytes() == b"mine" and open_model(path).metadata == {"one": "entry"}

    change(path, other, {"two": "2"}, overwrite=True)
    assert open_model(other).metadata == {"one": "entry", "two": "2"}


def test_a_thumbnail_is_stored_as_a_small_jpeg_in_the_header(tmp_path: Path):
    path = random_file(tmp_path / "a.safetensors")
    Image.linear_gradient("L").resize((900, 600)).save(tmp_path / "p.png")

    change(path, tmp_path / "b.safetensors", {}, thumbnail=tmp_path / "p.png")

    url = open_model(tmp_path / "b.safetensors").metadata["modelspec.thumbnail"]
    kind, _, data = url.partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and picture.size == (256, 171)


def test_invalid_metadata_changes_are_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.ckpt")
    path = random_file(tmp_path / "a.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:-5])

    with pytest.raises(RequestError, match=r"which has no metadata; convert it to \.safetensors first"):
        change(tmp_path / "a.ckpt", tmp_path / "b.ckpt", {"a": "b"})
    with pytest.raises(RequestError, match="'three' is not in the metadata"):
        change(path, path, {}, ["three"])
    with pytest.raises(DamagedFile):
        write_metadata(tmp_path / "broken.safetensors", tmp_path / "b.safetensors", {})


# ---- differences


def test_a_file_equals_itself(narrow: Narrows):
    file = open_model(narrow("sd1").file)

    found = diff(file, file)

    assert found.equal and not found.furthest
    assert {part.name for part in found.parts} == {"unet", "vae", "text_encoder"}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_file_equals_the_folder_that_it_was_converted_to(narrow: Narrows, tmp_path: Path, family: str):
    """SD2's folder has a layer less, whose weights are in its leftovers, like the noise schedule."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["betas"] = torch.linspace(0, 1, 1000, dtype=torch.float64)
        name = next(name for name in tensors if name.startswith("model.diffusion_model."))
        tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1

    file = altered(narrow(family).file, tmp_path / "a.safetensors", add)
    convert(file, tmp_path / "folder")

    for pair in ((file, tmp_path / "folder"), (tmp_path / "folder", file)):
        found = diff(*open_both(*pair))
        assert found.equal and not (found.only_a or found.only_b or found.dtypes)
        assert {"unet", "vae", "text_encoder"} <= {part.name for part in found.parts}


def test_a_component_equals_that_of_the_whole_model_in_another_layout(narrow: Narrows, tmp_path: Path):
    convert(narrow("sd1").file, tmp_path / "vae", only="vae", to="diffusers")

    found = diff(*open_both(tmp_path / "vae", narrow("sd1").file))

    (vae,) = found.parts
    assert vae.name == "vae" and vae.same == vae.tensors > 50 and not found.only_a and found.only_b


def test_a_changed_weight_is_found_in_another_layout(narrow: Narrows, tmp_path: Path):
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    other = altered(
        narrow("sd1").file, tmp_path / "b.safetensors", lambda tensors: tensors.update({name: tensors[name] * 3})
    )

    found = diff(*open_both(other, narrow("sd1").folder))

    assert not found.equal and [part.name for part in found.parts if part.same != part.tensors] == ["vae"]
    assert [each.name for each in found.furthest] == [name]
    assert found.furthest[0].relative == pytest.approx(2 / 3, rel=1e-6)


def test_differences_are_measured_per_tensor_and_component(narrow: Narrows, tmp_path: Path):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name] * 1.5
        tensors["extra"] = torch.zeros(1)
        tensors["first_stage_model.quant_conv.bias"] = tensors["first_stage_model.quant_conv.bias"].half()
        del tensors["first_stage_model.post_quant_conv.bias"]

    other = altered(narrow("sd1").file, tmp_path / "b.safetensors", change)

    found = diff(open_model(narrow("sd1").file), open_model(other))

    assert found.only_a == ("first_stage_model.post_quant_conv.bias",) and found.only_b == ("extra",)
    assert [each.partition(":")[0] for each in found.dtypes] == ["first_stage_model.quant_conv.bias"]
    assert found.furthest[0].name == name and math.isclose(found.furthest[0].relative, 0.5, rel_tol=1e-6)
    unet = next(part for part in found.parts if part.name == "unet")
    assert unet.tensors - unet.same == 1


def test_the_same_values_in_another_dtype_are_equal(tmp_path: Path):
    values = torch.arange(10.0)
    save_file({"a": values}, tmp_path / "a.safetensors")
    save_file({"a": values.half()}, tmp_path / "b.safetensors")

    found = diff(open_model(tmp_path / "a.safetensors"), open_model(tmp_path / "b.safetensors"))

    assert found.equal and found.dtypes == ("a: F32, F16",)


# ---- counted nouns


def test_counted_nouns_are_singular_for_one_only():
    assert [plural(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [plural(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
