"""Builds pickles, zip archives, tar archives and legacy files byte by byte, so that tests can corrupt any part."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

MAGIC = 0x1950A86A20F9469CFC6C


# ---- pickles, in protocol 2 unless specified otherwise


def program(*parts: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def list_of(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def dict_of(*pairs: bytes) -> bytes:
    return b"}(" + b"".join(pairs) + b"u"


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return name(module, attribute) + tuple_of(*args) + b"R"


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", extra: bytes = b"") -> bytes:
    """A persistent id as torch.save writes it; `extra` is the sixth item in the legacy format."""
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    return tuple_of(text("storage"), name(module, kind), text(key), text("cpu"), number(count), extra) + b"Q"


def tensor(stored: bytes, size: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1), offset: int = 0) -> bytes:
    hooks = call("collections", "OrderedDict")
    sizes, strides = (tuple_of(*map(number, values)) for values in (size, stride))
    return call("torch._utils", "_rebuild_tensor_v2", stored, number(offset), sizes, strides, b"\x89", hooks)


def good_pickle() -> bytes:
    """{'w': a 2x2 float32 tensor of storage 0}"""
    return program(dict_of(text("w"), tensor(storage())))


FLOATS = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)


# ---- zip archives


@dataclass
class Member:
    """An entry of a zip archive. Fields that are not None replace the correct value in one of its two headers."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    central_name: str | None = None
    central_size: int | None = None
    central_crc: int | None = None
    local_size: int | None = None
    local_method: int | None = None
    central_offset: int | None = None
    hidden: bool = False  # the entry is not listed in the directory


def zip_archive(*members: Member, comment: bytes = b"", count: int | None = None, between: bytes = b"") -> bytes:
    body, directory = b"", b""
    for member in members:
        packed = member.data
        if member.method == 8:
            compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = compressor.compress(member.data) + compressor.flush()
        crc, raw = zlib.crc32(member.data), member.name.encode()
        offset = len(body)
        size = len(member.data)
        method = member.method if member.local_method is None else member.local_method
        stated = size if member.local_size is None else member.local_size
        body += struct.pack(
            "<4s5H3I2H", b"PK\3\4", 20, member.flags, method, 0, 0, crc, len(packed), stated, len(raw), 0
        )
        body += raw + packed + between
        if member.hidden:
            continue
        raw = raw if member.central_name is None else member.central_name.encode()
        crc = crc if member.central_crc is None else member.central_crc
        stated = size if member.central_size is None else member.central_size
        length = len(packed) if member.central_size is None else member.central_size
        offset = offset if member.central_offset is None else member.central_offset
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, 20, member.flags, member.method, 0, 0, crc, length, stated,
            len(raw), 0, 0, 0, 0, 0, offset,
        )  # fmt: skip
        directory += raw
    listed = sum(not member.hidden for member in members) if count is None else count
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, listed, listed, len(directory), len(body), len(comment))
    return body + directory + end + comment


def torch_zip(pickle: bytes | None = None, *storages: bytes, root: str = "archive", order: str = "little") -> bytes:
    """A file in torch's zip format: the pickle, and the storages under their numbers."""
    return zip_archive(*torch_members(pickle, *storages, root=root, order=order))


def torch_members(
    pickle: bytes | None = None, *storages: bytes, root: str = "archive", order: str = "little"
) -> list[Member]:
    pickle = good_pickle() if pickle is None else pickle
    data = [Member(f"{root}/data/{key}", raw) for key, raw in enumerate(storages or (FLOATS,))]
    return [
        Member(f"{root}/data.pkl", pickle),
        Member(f"{root}/byteorder", order.encode()),
        *data,
        Member(f"{root}/version", b"3\n"),
    ]


# ---- the older formats


def legacy(pickle: bytes, keys: list[str], *storages: tuple[int, bytes]) -> bytes:
    """torch.save's format before zip: five pickles, then each storage's element count and bytes."""
    head = program(number(MAGIC)) + program(number(1001)) + program(dict_of(text("little_endian"), b"\x88"))
    tail = b"".join(struct.pack("<q", count) + raw for count, raw in storages)
    return head + pickle + program(list_of(*map(text, keys))) + tail


def legacy_pickle() -> bytes:
    return program(dict_of(text("w"), tensor(storage("77", extra=b"N"))))


def tar_archive(**members: bytes) -> bytes:
    """A POSIX tar archive of plain files."""
    out = b""
    for member, data in members.items():
        header = bytearray(512)
        header[:100] = member.encode().ljust(100, b"\0")
        header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
        header[124:136] = f"{len(data):011o}\0".encode()
        header[136:148], header[156:157] = b"00000000000\0", b"0"
        header[257:265] = b"ustar\x0000"
        header[148:156] = b"        "
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        out += bytes(header) + data + b"\0" * (-len(data) % 512)
    return out + b"\0" * 1024


def torch_tar(pickle: bytes | None = None, count: int = 4, raw: bytes = FLOATS, *views: bytes) -> bytes:
    """The format of torch before 0.1.2: a float32 storage 11, views of it, a 2x2 tensor 22 of it, and the pickle."""
    storages = program(number(1)) + program(tuple_of(number(11), text("cpu"), name("torch", "FloatStorage")))
    storages += struct.pack("<q", count) + raw + program(list_of(*views))
    tensors = program(number(1)) + program(tuple_of(number(22), number(11), name("torch", "FloatTensor")))
    tensors += struct.pack("<ii2q2qq", 2, 0, 2, 2, 2, 1, 0)
    pickle = program(dict_of(text("w"), text("22") + b"Q")) if pickle is None else pickle
    return tar_archive(storages=storages, tensors=tensors, pickle=pickle)


# ---- safetensors


def safetensors(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(name: str = "w", dtype: str = "F32", shape: str = "[2,2]", offsets: str = "[0,16]") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'
