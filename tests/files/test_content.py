"""Files with a model's name that are something else: the error states what each is and what to do, in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from PIL import Image

from gouache.errors import DamagedFile, FileError, NotAModel
from gouache.files.open import open_model


def picture(form: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, form)
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/readme.txt", "hello " * 100)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("readme.txt"))
    return stream.getvalue()


def field(number: int, content: bytes) -> bytes:
    """One length-delimited field of a protobuf message."""
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


# tensorflow.MetaGraphDef { meta_info_def { tensorflow_version } graph_def { node } saver_def }
META_GRAPH = (
    field(1, field(5, b"1.4.0") + field(6, b"unknown")) + field(2, field(1, field(1, b"conv" * 50))) + field(3, b"")
)
LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4265146304\n"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.ckpt", b"", "is empty"),
        ("page.safetensors", b"\n<!DOCTYPE html>\n<html lang='en'><title>Sign in</title>", "web page"),
        ("page.ckpt", b"<html><body>404</body></html>", "web page"),
        ("denied.ckpt", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        ("error.safetensors", b'{"error": "Invalid credentials in Authorization header"}', "Invalid credentials"),
        ("pointer.safetensors", LFS, "git-lfs pointer to 4265 MB"),
        ("config.ckpt", json.dumps({"_class_name": "UNet2DConditionModel"}).encode(), "open the folder"),
        ("model.safetensors", picture("PNG"), "PNG picture"),
        ("model.ckpt", picture("JPEG"), "JPEG picture"),
        ("model.ckpt", picture("WEBP"), "WebP picture"),
        ("model.ckpt", gzip.compress(b"hello" * 99), "gzip"),
        ("model.ckpt", bz2.compress(b"hello" * 99), "bzip2"),
        ("model.ckpt", lzma.compress(b"hello" * 99), "xz archive"),
        ("model.ckpt", b"7z\xbc\xaf\x27\x1c" + bytes(99), "7-Zip"),
        ("model.ckpt", b"Rar!\x1a\x07\x01\x00" + bytes(99), "RAR"),
        ("model.ckpt", zipped(), "ordinary zip"),
        ("model.ckpt", tarred(), "tar archive"),
        ("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "GGUF"),
        ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        ("model.onnx", b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(99), "ONNX"),
        ("array.npy", b"\x93NUMPY\x01\x00" + bytes(99), "numpy array"),
        ("model.ckpt.index", bytes(range(1, 90)) + bytes.fromhex("57fb808b247547db"), "TensorFlow checkpoint index"),
        ("model.ckpt.meta", META_GRAPH, "TensorFlow graph"),
        ("model.ckpt.data-00000-of-00001", numpy.linspace(-1, 1, 99).tobytes(), "TensorFlow checkpoint's data part"),
        ("notes.ckpt", b"Lorem ipsum dolor sit amet.\n" * 9, "text file"),
        ("v1-inference.yaml", b"model:\n  base_learning_rate: 1.0e-04\n", "text file"),
        ("noise.bin", b"\xde\xad\xbe\xef" * 30, "unknown format"),
        ("setup.ckpt", b"MZ" + bytes(99), "Windows program"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_the_error_states_what_the_file_is(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(NotAModel, match=message) as caught:
        open_model(tmp_path / name)

    assert str(caught.value).startswith((f"{tmp_path / name}: is ", f"{tmp_path / name}: has an unknown format"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("letter", [chr(code) for code in range(32, 127) if chr(code) not in "ciP{[<"])
def test_text_is_called_text_whatever_it_begins_with(tmp_path: Path, letter: str):
    """Nearly every letter begins some pickle; `c`, `i` and `P` name something that any loader would look up."""
    path = tmp_path / "notes.bin"
    path.write_text(f"{letter}oot:x:0:0, which is no model\nand a second line\n")

    with pytest.raises(NotAModel, match="is a text file, not a model"):
        open_model(path)


def test_the_error_for_a_tensorflow_file_states_what_to_get_instead(tmp_path: Path):
    (tmp_path / "m.ckpt.meta").write_bytes(META_GRAPH)

    with pytest.raises(NotAModel, match=r"no Stable Diffusion weights .* \.safetensors or \.ckpt"):
        open_model(tmp_path / "m.ckpt.meta")


def test_the_error_for_an_incomplete_download_states_its_size(tmp_path: Path):
    safetensors.torch.save_file({"w": torch.zeros(5_000_000)}, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:6_100_000])

    with pytest.raises(DamagedFile, match="ends after 6 of 20 MB: the download is incomplete"):
        open_model(tmp_path / "m.safetensors")


def test_a_preallocated_download_is_recognised(tmp_path: Path):
    (tmp_path / "m.safetensors").write_bytes(bytes(100_000))

    with pytest.raises(DamagedFile, match="zeros only"):
        open_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.bin", "m.safetensors", "m", "m.png"])
def test_the_content_decides_and_a_wrong_suffix_is_noted(tmp_path: Path, name: str):
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / name)

    file = open_model(tmp_path / name)

    assert file.format == "safetensors"
    assert bool(file.notes) == (name in ("m.ckpt", "m.pt", "m.bin"))


def test_a_checkpoint_named_safetensors_opens_with_a_note(tmp_path: Path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "m.safetensors")

    file = open_model(tmp_path / "m.safetensors")

    assert file.format == "torch zip"
    assert "the name ends in .safetensors" in file.notes[0]


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x8B1F, 0x4D5A, 0x5A4D, 0x4B50, 0x3C3C])
def test_a_header_length_that_looks_like_another_signature_is_read_correctly(tmp_path: Path, length: int):
    header = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", length) + header + b"abcd")

    assert open_model(tmp_path / "m.safetensors").tensor("w").tolist() == list(b"abcd")


@pytest.mark.parametrize("codec", ["utf-16", "utf-32-le", "utf-8-sig"])
def test_a_configuration_must_be_utf_8(tmp_path: Path, codec: str):
    (tmp_path / "model_index.json").write_bytes(json.dumps({"_class_name": "X"}).encode(codec))

    message = "without weights" if codec == "utf-8-sig" else "not valid JSON"
    with pytest.raises(NotAModel, match=message):
        open_model(tmp_path)


def test_a_link_to_a_file_is_followed(tmp_path: Path):
    # The Hugging Face cache stores files by their hashes, and links to them by their names.
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "0a1b2c")
    (tmp_path / "model.safetensors").symlink_to("0a1b2c")

    assert list(open_model(tmp_path / "model.safetensors")) == ["w"]


def test_a_file_without_read_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m.ckpt").write_bytes(b"x")

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    # Patched, because permissions do not apply to the superuser, who may run the tests.
    monkeypatch.setattr("os.open", denied)

    with pytest.raises(FileError, match="Permission denied"):
        open_model(tmp_path / "m.ckpt")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_an_invalid_path_is_a_one_line_error(name: str):
    with pytest.raises(FileError, match=r"cannot be (read|opened)|not a possible file name"):
        open_model(Path(name))
