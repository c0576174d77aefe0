"""Seeds of the fuzzer: the valid and hostile files of the other tests, and every global that a pickle may use.

The first byte of an input selects the container of the rest, so that mutations need not guess a checksum or a length:
none (the rest is a whole file), or a valid file with the rest as its pickle, header or text.
"""

from __future__ import annotations

import argparse
import base64
import collections
import datetime
import io
import itertools
import pathlib
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from PIL import Image, PngImagePlugin
from torch import nn

from gouache.files.pickle_allow_list import ALLOW_LIST
from gouache.files.pickle_machine import Global
from tests.files import assemble as a
from tests.files.corpus import calls, write_corpus
from tests.files.fake_modules import config, fake_modules
from tests.files.test_mutations import VALID, VALUE, saved
from tests.files.test_picture_file import in_pixels

LARGEST = 16_384


def whole(data: bytes) -> bytes:
    return data


def in_zip(program: bytes) -> bytes:
    return a.torch_zip(program)


def in_big_endian(program: bytes) -> bytes:
    return a.torch_zip(program, order="big")


def in_legacy(program: bytes) -> bytes:
    return a.legacy(program, ["77"], (4, a.FLOATS))


def in_tar(program: bytes) -> bytes:
    return a.torch_tar(program, 4, a.FLOATS, a.tuple_of(*map(a.number, (12, 11, 1, 2))))


def header(text: bytes) -> bytes:
    return a.safetensors(text, a.FLOATS)


def picture(text: bytes) -> bytes:
    """A PNG picture with an embedding, as JSON, in a text chunk."""
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("sd-ti-embedding", base64.b64encode(text).decode())
    Image.new("RGB", (1, 1)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def pixels(text: bytes) -> bytes:
    """A PNG picture with an embedding, as JSON, in its pixels."""
    stream = io.BytesIO()
    in_pixels(zlib.compress(text), 16).save(stream, "PNG")
    return stream.getvalue()


CONTAINERS: tuple[Callable[[bytes], bytes], ...] = (
    whole, in_zip, in_big_endian, in_legacy, in_tar, header, picture, pixels
)  # fmt: skip


def file_of(data: bytes) -> bytes:
    """The file that an input describes."""
    return CONTAINERS[data[0] % len(CONTAINERS)](data[1:]) if data else b""


def seeds() -> Iterator[bytes]:
    """Inputs, none longer than `LARGEST`."""
    by_container: dict[Callable[[bytes], bytes], list[bytes]] = {
        whole: list(contents()),
        header: [b"{%s}" % a.entry().encode(), b'{"__metadata__":{"k":"\\u00e9"},"w":{"dtype":"F16","shape":[8],'
                 b'"data_offsets":[0,16]}}', b"{}"],
        picture: [b'{"string_to_param":{"*":{"TORCHTENSOR":[[1.5,2]]}},"name":"fox"}', b'{"a":1}'],
    }  # fmt: skip
    by_container[pixels] = by_container[picture]
    by_container[in_zip] = by_container[in_legacy] = by_container[in_tar] = list(pickles())
    by_container[in_big_endian] = by_container[in_zip][:40]
    for container, inputs in by_container.items():
        for each in inputs:
            if len(each) < LARGEST:
                yield bytes([CONTAINERS.index(container)]) + each


def contents() -> Iterator[bytes]:
    yield from VALID.values()
    for value in objects():
        yield from (saved(value), saved(value, _use_new_zipfile_serialization=False))
    with tempfile.TemporaryDirectory() as folder:
        for case in write_corpus(Path(folder)):
            path = Path(folder) / case.name
            # Without files that use up a limit of the reader: each mutation of one takes a second.
            if path.is_file() and path.stat().st_size < LARGEST and not case.name.startswith("bomb-"):
                yield path.read_bytes()
    yield b'{"weight_map":{"a":"m.ckpt"}}'
    yield b"version https://git-lfs.github.com/spec/v1\nsize 4265146304\n"


def pickles() -> Iterator[bytes]:
    yield a.good_pickle()
    yield a.legacy_pickle()
    yield a.program(a.dict_of(a.text("w"), a.text("22") + b"Q"))
    for protocol in (2, 5):
        # Lazily: some can be pickled only while their fake modules exist.
        for value in itertools.chain([VALUE], objects()):
            with zipfile.ZipFile(io.BytesIO(saved(value, pickle_protocol=protocol))) as archive:
                yield archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    plain = {"epoch": 3, "name": "ü", "many": 2**70, "list": [1.5, None, True, (1, 2)], "bytes": b"\xff", "set": {1}}
    yield from (pickle.dumps(plain, protocol) for protocol in (0, 1, 4))
    allowed = (ALLOW_LIST.functions, ALLOW_LIST.classes, ALLOW_LIST.values)
    for each in (each for names in allowed for each in cast(Iterable[Global], names)):
        yield a.program(a.call(each.module, each.name))
        yield a.program(a.name(each.module, each.name) + b")\x81" + a.dict_of(a.text("k"), b"N") + b"b")
    for _, content, _, _ in calls("proof"):
        yield content


def objects() -> Iterator[Any]:
    """Values as in real checkpoints, each for a separate small file: tensors of every kind, and other values."""
    tensor = torch.arange(4.0)
    kinds = (torch.float16, torch.complex64, torch.uint16, torch.float8_e5m2)
    yield from (tensor.to(kind) for kind in kinds)
    yield from (tensor.view(2, 2).t(), nn.Parameter(tensor), torch.empty(0, 2), tensor[1:3], tensor.untyped_storage())
    attributed = tensor.clone()
    attributed.note = "an attribute"  # type: ignore[attr-defined]
    yield [
        attributed,
        nn.ParameterDict({"x": nn.Parameter(tensor)}),
        torch.strided,
        torch.Size([2]),
        torch.device("cpu"),
    ]
    array = numpy.arange(4.0, dtype=numpy.float32)
    yield from (array, array.reshape(2, 2, order="F"), array.astype(">i2"), numpy.str_("text"), numpy.array(["text"]))
    yield [numpy.float32(1.5), numpy.complex64(1 + 2j), numpy.bool_(True)]
    yield collections.OrderedDict(a=tensor, b={1, 2.5}, c=frozenset("a"), d=1 + 2j, e=bytearray(b"\xff"), f=b"\xff")
    yield [collections.defaultdict(list, {"a": [1]}), collections.Counter("aab"), collections.deque([1, 2], maxlen=5)]
    yield [pathlib.PurePosixPath("/a/b"), argparse.Namespace(lr=0.1), datetime.timedelta(1), nn.Linear, 2**100, "ü"]
    with fake_modules() as classes:
        callback = classes["ModelCheckpoint"]()
        callback.__dict__.update(monitor="loss", best=tensor)
        yield {"object": callback, classes["ModelCheckpoint"]: classes["AttributeDict"](a=1)}
        yield config(classes, {"model": {"layers": [1, 2]}, "name": "sd"})
