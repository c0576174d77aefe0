"""`hash`, `metadata` and `diff`, compared with other implementations and with known contents."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gouache.errors import DamagedFile, RequestError
from gouache.files.metadata import write_metadata
from gouache.files.open import open_model
from gouache.wording import plural
from gouache.workshop.diff import diff
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
