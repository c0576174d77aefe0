"""Hostile and broken files of every known class, each with the expected error.

`write_corpus(folder)` writes them. Every payload, if something ran it, would make a folder `proof-<case name>` next
to the file (`test_hostile` lets an unrestricted loader do this, to show that the payloads work).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import assemble as a
from .assemble import FLOATS, Member, call, dict_of, list_of, name, number, program, tensor, text, tuple_of

UNSAFE, DAMAGED, NOT_A_MODEL, FILE = "UnsafeFile", "DamagedFile", "NotAModel", "FileError"


@dataclass(frozen=True)
class Case:
    name: str
    verdict: str  # the class of the error
    message: str  # text that the error message must contain
    fires: bool = False  # an unrestricted loader runs the payload


def write_corpus(folder: Path) -> list[Case]:
    """Writes `<case name>.ckpt` (or .safetensors) for each case; returns the cases."""
    cases: list[Case] = []
    for case, content in _everything(folder):
        (folder / case.name).write_bytes(content)
        cases.append(case)
    return cases + _special_files(folder)


def _everything(folder: Path) -> Iterator[tuple[Case, bytes]]:
    for case_name, pickle, message, fires in calls(str(folder)):
        yield Case(f"call-{case_name}.ckpt", UNSAFE, message, fires), pickle
    yield from _call_containers(str(folder))
    yield from _pickle_bombs()
    yield from _invalid_tensors()
    yield from _invalid_zips()
    yield from _invalid_legacy()
    yield from _invalid_safetensors()


# ---- files that call code


def calls(folder: str) -> Iterator[tuple[str, bytes, str, bool]]:
    """(name, pickle, text that the message must contain, whether an unrestricted loader runs it on this system)."""

    def proof(case: str) -> str:
        return os.path.join(folder, f"proof-call-{case}.ckpt")  # noqa: PTH118 as a string, for the payload

    def code(case: str) -> bytes:
        return text(f"__import__('os').mkdir({proof(case)!r})")

    def gadget(case: str, module: str, attribute: str, *args: bytes, fires: bool = True):
        return case, program(call(module, attribute, *args)), f"{module}.{attribute}", fires

    def command(case: str) -> bytes:
        return text(f"mkdir {proof(case)}")

    yield gadget("os-system", "os", "system", command("os-system"))
    yield gadget("posix-system", "posix", "system", command("posix-system"), fires=os.name == "posix")
    yield gadget("nt-system", "nt", "system", command("nt-system"), fires=os.name == "nt")
    yield gadget("mkdir", "os", "mkdir", text(proof("mkdir")))
    yield gadget("eval", "builtins", "eval", code("eval"))
    yield gadget("eval-py2", "__builtin__", "eval", code("eval-py2"), fires=False)
    yield gadget("exec", "builtins", "exec", code("exec"))
    yield gadget("popen", "subprocess", "Popen", list_of(text("mkdir"), text(proof("popen"))))
    yield gadget("getattr", "builtins", "getattr", name("os", "path"), text("join"), fires=False)
    yield gadget("import", "builtins", "__import__", text("antigravity"), fires=False)
    yield gadget("import-module", "importlib", "import_module", text("antigravity"), fires=False)
    yield gadget("open-write", "io", "open", text(proof("open-write")), text("w"))
    yield gadget("codecs-open", "codecs", "open", text(proof("codecs-open")), text("w"))
    yield gadget("gzip-open", "gzip", "open", text(proof("gzip-open")), text("wb"))
    yield gadget("tarfile-open", "tarfile", "open", text(proof("tarfile-open")), text("w"))
    yield gadget("runpy", "runpy", "_run_code", code("runpy"), dict_of(), fires=False)
    yield gadget("timeit", "timeit", "timeit", text("0"), code("timeit"), fires=True)
    yield gadget("profile", "cProfile", "run", code("profile"))
    yield gadget("pkgutil", "pkgutil", "resolve_name", text("os:system"), fires=False)
    yield gadget("code", "code", "InteractiveInterpreter", fires=False)
    yield gadget("marshal", "marshal", "loads", b"C\x00", fires=False)
    yield gadget("pickle-loads", "pickle", "loads", b"B" + struct.pack("<I", 4) + b"N.N.", fires=False)
    yield gadget("copyreg-extension", "copyreg", "add_extension", text("os"), text("system"), number(7), fires=False)
    yield gadget("function-type", "types", "FunctionType", fires=False)
    yield gadget("ctypes", "ctypes", "CDLL", text("nothing"), fires=False)
    yield gadget("numpy-load", "numpy", "load", text("/etc/passwd"), fires=False)
    yield gadget("numpy-memmap", "numpy", "memmap", text(proof("numpy-memmap")), text("uint8"), text("w+"),
                 number(0), number(1))  # fmt: skip
    yield gadget("storage-load", "torch.storage", "_load_from_bytes", b"C\x02N.", fires=False)
    yield gadget("dotted-import", "torch._utils", "_import_dotted_name", text("os.system"), fires=False)
    yield gadget("fx", "torch.fx.graph_module", "_forward_from_src", text("x"), dict_of(), fires=False)
    yield gadget("logging-config", "logging.config", "dictConfig", dict_of(
        text("version"), number(1), text("formatters"), dict_of(text("f"), dict_of(
            text("()"), text("os.mkdir"), text("path"), text(proof("logging-config"))))))  # fmt: skip
    yield gadget("spawn", "multiprocessing.util", "spawnv_passfds", b"C\x0a/bin/mkdir", list_of(
        text("mkdir"), text(proof("spawn"))), tuple_of(), fires=os.name == "posix")  # fmt: skip
    yield gadget("sparse", "torch._utils", "_rebuild_sparse_tensor", fires=False)
    yield gadget("quantized", "torch._utils", "_rebuild_qtensor", fires=False)
    yield gadget("nested", "torch._utils", "_rebuild_nested_tensor", fires=False)
    yield gadget("module", "torch.nn.modules.linear", "Linear", number(1), number(1), fires=False)

    # The same call in every form that pickle has.
    def raw(case: str) -> bytes:
        return proof(case).encode()

    mkdir = "os.mkdir"
    yield "proto0", b"cos\nmkdir\n(S'" + raw("proto0") + b"'\ntR.", mkdir, True
    yield "proto0-inst", b"(S'" + raw("proto0-inst") + b"'\nios\nmkdir\n.", mkdir, True
    yield "proto1-obj", b"(cos\nmkdir\nS'" + raw("proto1-obj") + b"'\no.", mkdir, True

    def sized(case: str) -> bytes:
        return text(proof(case))

    stack_global = b"\x8c\x02os\x8c\x05mkdir\x93"
    yield "stack-global", program(stack_global, sized("stack-global"), b"\x85R", protocol=4), mkdir, True
    yield "memo", program(name("os", "mkdir"), b"q\x010", b"h\x01", sized("memo"), b"\x85R"), mkdir, True
    yield "in-state-dict", program(
        dict_of(text("state_dict"), dict_of(text("w"), call("os", "mkdir", sized("in-state-dict"))))
    ), mkdir, True  # fmt: skip
    yield "popped", program(call("os", "mkdir", sized("popped")), b"0", dict_of()), mkdir, True
    yield "in-key", program(b"}", call("os", "mkdir", sized("in-key")), b"Ns"), mkdir, True
    yield "in-set", program(list_of(call("os", "mkdir", sized("in-set")))), mkdir, True
    yield "dotted", program(
        b"\x8c\x08argparse\x8c\x0a_os.system\x93", text("mkdir " + proof("dotted")), b"\x85R", protocol=4
    ), "argparse._os.system", True  # fmt: skip
    yield "dotted-alone", program(b"\x8c\x07pathlib\x8c\x0aPath.touch\x93", protocol=4), "pathlib.Path.touch", False
    yield "newobj", program(name("subprocess", "Popen"), b")\x81"), "subprocess.Popen", False
    yield "newobj-ex", program(name("subprocess", "Popen"), b")}\x92", protocol=4), "subprocess.Popen", False
    yield "newobj-function", program(name("_codecs", "encode"), b")\x81"), "_codecs.encode", False
    yield "build-name", program(name("os", "environ"), dict_of(text("a"), text("b")), b"b"), "os.environ", False
    yield "build-dict", program(b"}", dict_of(text("__class__"), text("b")), b"b"), "a state for dict", False
    yield "build-tensor", program(tensor(a.storage()), tuple_of(), b"b"), "_rebuild_tensor_v2", False
    yield "entries-of-name", program(name("os", "environ"), text("a"), text("b"), b"s"), "os.environ", False
    yield "append-to-name", program(name("sys", "path"), text("a"), b"a"), "sys.path", False
    yield "setitem-on-tensor", program(tensor(a.storage()), text("a"), text("b"), b"s"), "entries", False
    yield "call-of-call", program(call("builtins", "getattr", name("os", "path"), text("x")), b")R"), "getattr", False
    yield "extension-1", program(b"\x82\x07", b")R"), "extension 7", False
    yield "extension-2", program(b"\x83\x07\x01", b")R"), "extension 263", False
    yield "extension-4", program(b"\x84\x07\0\0\0", b")R"), "extension 7", False
    yield "persistent-text", b"Pos.system\n.", "persistent id", False
    yield "next-buffer", program(b"\x97", protocol=5), "buffer", False
    factory = call("collections", "defaultdict", name("builtins", "eval"))
    yield "defaultdict", program(factory, b"0", call("os", "mkdir", sized("defaultdict"))), mkdir, True
    yield "rebuild-from-type", program(call(
        "torch._tensor", "_rebuild_from_type_v2", name("os", "system"), name("torch", "Tensor"),
        tuple_of(text("mkdir " + proof("rebuild-from-type"))), b"N")), "os.system", True  # fmt: skip

    # An object is given `__setstate__`; a second state, or attribute access to its own entries, then calls it.
    def made(module: str, attribute: str) -> bytes:
        return name(module, attribute) + b")\x81"

    method = dict_of(text("__setstate__"), name("os", "mkdir"))
    for kind in ("argparse.Namespace", "collections.OrderedDict", "types.SimpleNamespace"):
        case = f"setstate-{kind}"
        yield case, program(made(*kind.rsplit(".", 1)), method, b"b", sized(case), b"b"), mkdir, True
    slots = tuple_of(b"N", method)
    yield (
        "setstate-slots",
        program(made("argparse", "Namespace"), slots, b"b", sized("setstate-slots"), b"b"),
        mkdir,
        True,
    )
    inner = call("collections", "OrderedDict", list_of(tuple_of(text("__setstate__"), name("os", "mkdir"))))
    yield (
        "setstate-pairs",
        program(made("argparse", "Namespace"), inner, b"b", sized("setstate-pairs"), b"b"),
        mkdir,
        True,
    )
    old = b"X" + struct.pack("<I", 12) + b"__setstate__"
    for case, spelled in (("short", b"\x8c\x0c__setstate__"), ("py2", b"U\x0c__setstate__"), ("text", old),
                          ("long", b"\x8d" + struct.pack("<Q", 12) + b"__setstate__"),
                          ("quoted", b"S'__setstate__'\n"), ("line", b"V__setstate__\n")):  # fmt: skip
        yield f"setstate-{case}", program(
            made("argparse", "Namespace"), b"}", spelled, name("os", "mkdir"), b"sb", sized(f"setstate-{case}"), b"b",
            protocol=4), mkdir, True  # fmt: skip
    twice = program(made("argparse", "Namespace"), dict_of(), b"b", dict_of(), b"b")
    yield "state-twice", twice, "a second state for argparse.Namespace", False
    yield "state-memo", program(
        made("argparse", "Namespace"), b"q\x01", dict_of(), b"b", b"0h\x01", dict_of(), b"b"
    ), "a second state", False  # fmt: skip
    yield "state-class", program(
        made("argparse", "Namespace"), dict_of(text("__class__"), name("collections", "OrderedDict")), b"b"
    ), "with __class__", False  # fmt: skip
    yield "entries-setstate", program(
        made("easydict", "EasyDict"), text("__setstate__"), name("collections", "OrderedDict"), b"s"
    ), "__setstate__", False  # fmt: skip
    # Only named: another loader imports its module, and whoever uses the value may call it.
    yield "named", program(dict_of(text("w"), name("os", "system"))), "os.system", False
    yield "named-popped", program(name("antigravity", "x"), b"0", dict_of()), "antigravity.x", False
    yield "named-in-state", program(
        made("argparse", "Namespace"), dict_of(text("f"), name("os", "system")), b"b"
    ), "os.system", False  # fmt: skip
    yield "named-argument", program(call("collections", "defaultdict", name("os", "getcwd"))), "os.getcwd", False
    # numpy data types that hold objects: their bytes are another pickle.
    inner_pickle = b"B" + struct.pack("<I", 25) + b"cos\nsystem\n(S'echo hi'\ntR."
    for objects in ("O", "|O", "O8", "object", "f4,O"):
        dtype = call("numpy", "dtype", text(objects), b"\x89", b"\x88")
        yield f"numpy-{objects.replace('|', '-')}", program(
            call("numpy.core.multiarray", "scalar", dtype, inner_pickle)
        ), "numpy.dtype of", False  # fmt: skip
    plain = call("numpy", "dtype", text("V8"), b"\x89", b"\x88")
    fields = tuple_of(number(3), text("|"), b"N", tuple_of(text("a")), dict_of(text("a"), number(1)),
                      number(1), number(1), number(0))  # fmt: skip
    yield "numpy-fields", program(
        call("numpy.core.multiarray", "scalar", plain + fields + b"b", b"C\x08aaaaaaaa")
    ), "numpy.dtype with a state", False  # fmt: skip
    flags = tuple_of(number(3), text("|"), b"NNN", number(8), number(1), number(63))
    yield "numpy-flags", program(plain + flags + b"b0", dict_of()), "numpy.dtype with a state", False
    yield "codec", program(call("_codecs", "encode", text("a"), text("uu"))), "_codecs.encode as uu", False
    many = b"".join(call("os", f"mkdir{i}") + b"0" for i in range(300))
    yield "many", program(many, b"N"), "os.mkdir0 (byte 15)", False


def _call_containers(folder: str) -> Iterator[tuple[Case, bytes]]:
    def payload(case: str) -> bytes:
        proof = os.path.join(folder, f"proof-{case}")  # noqa: PTH118
        return program(dict_of(text("w"), call("os", "mkdir", text(proof))))

    case = Case("container-zip.ckpt", UNSAFE, "os.mkdir", True)
    yield case, a.torch_zip(payload(case.name))
    case = Case("container-zip.safetensors", UNSAFE, "os.mkdir")
    yield case, a.torch_zip(payload(case.name))
    case = Case("container-legacy.pt", UNSAFE, "os.mkdir", True)
    yield case, a.legacy(payload(case.name), [])
    case = Case("container-legacy-keys.pt", UNSAFE, "os.mkdir", True)
    proof = os.path.join(folder, f"proof-{case.name}")  # noqa: PTH118
    head = a.legacy(program(dict_of()), [])[: -len(program(list_of()))]
    yield case, head + program(call("os", "mkdir", text(proof)))
    case = Case("container-legacy-info.pt", UNSAFE, "os.mkdir", True)
    yield (
        case,
        program(number(a.MAGIC)) + program(number(1001)) + payload(case.name) + program(dict_of()) + program(b"]"),
    )
    case = Case("container-tar.pt", UNSAFE, "os.mkdir", True)
    yield case, a.torch_tar(payload(case.name))
    case = Case("container-legacy-then-zip.ckpt", UNSAFE, "os.mkdir", True)
    yield case, a.legacy(payload(case.name), []) + a.torch_zip()
    case = Case("container-plain-then-zip.ckpt", DAMAGED, "after the end")
    yield case, program(dict_of(text("w"), number(1))) + a.torch_zip()
    yield Case("container-zip-then-pickle.ckpt", DAMAGED, "zip"), a.torch_zip() + payload("x")
    for at in (0, 1):  # the code is compressed
        yield (
            Case(f"container-torchscript-{at}.pt", NOT_A_MODEL, "TorchScript"),
            a.zip_archive(
                *a.torch_members(),
                *[
                    Member("archive/constants.pkl", b"N."),
                    Member("archive/code/__torch__.py", b"import os" * 9, method=8),
                ][at:],
            ),
        )
    for case_name, pickle in (("number", b"\x80\x02K\x05."), ("text", program(text("hello")))):
        yield Case(f"container-{case_name}.pt", NOT_A_MODEL, "holds no tensors"), pickle
        yield Case(f"container-{case_name}-zip.pt", NOT_A_MODEL, "holds no tensors"), a.torch_zip(pickle)
    frame = b"\x80\x04\x95" + struct.pack("<Q", 1 << 40)
    yield Case("container-frame.pt", DAMAGED, "a frame of"), frame + b"}."
    yield Case("container-frame-zip.pt", DAMAGED, "a frame of"), a.torch_zip(frame + b"}.")
    nested = b"\x80\x04\x95" + struct.pack("<Q", 12) + b"\x95" + struct.pack("<Q", 1) + b"}0}."
    yield Case("container-frame-nested.pt", DAMAGED, "inside another"), nested
    yield (
        Case("container-torchscript.pt", NOT_A_MODEL, "TorchScript"),
        a.zip_archive(
            *a.torch_members(),
            Member("archive/code/__torch__.py", b"import os"),
            Member("archive/constants.pkl", b"N."),
        ),
    )


# ---- pickles that would take too much time or memory


def _pickle_bombs() -> Iterator[tuple[Case, bytes]]:
    def case(case_name: str, message: str, pickle: bytes, verdict: str = UNSAFE) -> tuple[Case, bytes]:
        return Case(f"bomb-{case_name}.ckpt", verdict, message), pickle

    doubling_tuple = b"N" + b"2\x86" * 40
    # Each list, or dictionary, contains the one before it twice.
    before = [(b"q" + bytes([i]) + b"0", b"h" + bytes([i])) for i in range(60)]
    doubling_list = b"]" + b"".join(keep + b"](" + recall * 2 + b"e" for keep, recall in before)
    doubling_dict = b"}" + b"".join(keep + dict_of(text("a"), recall, text("b"), recall) for keep, recall in before)
    yield case("tuple-key", "dictionary key", program(b"}", doubling_tuple, b"Ns"))
    yield case("tuple-in-set", "expands to far more", program(b"\x8f(", doubling_tuple, b"\x90", protocol=4))
    yield case("tuple-in-frozenset", "expands to far more", program(b"(", doubling_tuple, b"\x91", protocol=4))
    yield case(
        "tuple-in-counter", "dictionary key", program(call("collections", "Counter", b"}" + doubling_tuple + b"Ns"))
    )
    yield case("tuple-in-pairs", "expands to far more", program(
        call("collections", "OrderedDict", list_of(tuple_of(doubling_tuple, b"N")))))  # fmt: skip
    yield case("doubling-tuple", "expands to far more", program(doubling_tuple))
    yield case("doubling-list", "expands to far more", program(doubling_list))
    yield case("doubling-dict", "expands to far more", program(doubling_dict))
    yield case("deep-list", "deep", program(b"]" * 100_000 + b"a" * 99_999))
    yield case("deep-tuple", "deep", program(b"N" + b"\x85" * 500_000))
    yield case("deep-calls", "deep", program(name("builtins", "list") * 5000 + b"]" + b"\x85R" * 5000))
    yield case("itself", "contains itself", program(b"]q\0h\0a"))
    yield case("itself-dict", "contains itself", program(b"}q\0X\1\0\0\0ah\0s"))
    yield case("steps", "opcodes", program(b"N0" * 2_000_000))
    yield case("empty-lists", "opcodes", program(b"]" * 3_000_000))
    yield case("empty-sets", "opcodes", program(b"\x8f" * 3_000_000, protocol=4))
    yield case("memo", "opcodes", program(b"]\x94" * 1_500_000, protocol=4))
    yield case("calls", "opcodes", program(name("collections", "OrderedDict"), b"q\1)q\2", b"h\1h\2R" * 500_000))
    yield case("small-dicts", "opcodes", program(b"}NNs" * 600_000))
    yield case("number-keys", "numbers as dictionary keys", program(
        b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(40_000)) + b"u"))  # fmt: skip
    yield case("number-keys-many-dicts", "numbers as dictionary keys", program(
        b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(15_000)) + b"uq\1",
        list_of(*[b"h\1"] * 60)))  # fmt: skip
    yield case("numbers-in-sets", "numbers as dictionary keys", program(
        list_of(*(number(i * (2**61 - 1)) for i in range(15_000))), b"q\1",
        list_of(*[name("builtins", "set") + b"h\1\x85R"] * 60)))  # fmt: skip
    yield case("wide-text", "text and numbers", program(text("a" * 30_000_000 + "\N{SMILING FACE WITH HORNS}")))
    encoded = call("_codecs", "encode", b"h\1", text("latin1"))
    yield case("latin", "expands to far more", program(text("a" * 3_000_000), b"q\1", list_of(*[encoded] * 100)))
    # Values that are short, but endless when printed.
    made = call("torch._utils", "_rebuild_tensor_v3", b"N", b"N", b"N", b"N", b"N", b"N", doubling_list)
    yield case("printed-dtype", "unsupported dtype list", program(made), FILE)
    yield case("printed-storage", "unsupported type list", a.torch_zip(program(
        tensor(tuple_of(text("storage"), doubling_list, text("0"), text("cpu"), number(4)) + b"Q"))), FILE)  # fmt: skip
    made = call("torch._tensor", "_rebuild_from_type_v2", doubling_list, doubling_list, b")", b"N")
    yield case("printed-function", "calls list", program(made))
    shape = b"(" + number(2**250) * 100_000 + b"t"
    array = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b")", text("b"))
    kind = call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
    state = tuple_of(number(1), shape, kind, b"\x89", b"C\x04abcd")
    yield case("numpy-dimensions", "PyTorch never writes", program(array + state + b"b"), DAMAGED)
    yield case(
        "bytearray",
        "PyTorch never writes",
        program(call("builtins", "bytearray", number(10**10))),
        DAMAGED,
    )
    yield case(
        "bytes-of-number",
        "PyTorch never writes",
        program(call("builtins", "bytes", number(10**10))),
        DAMAGED,
    )
    yield case(
        "deque-maxlen",
        "PyTorch never writes",
        program(call("collections", "deque", number(10**9))),
        DAMAGED,
    )
    yield case("float-storage", "torch.FloatStorage", program(call("torch", "FloatStorage", number(10**10))))
    yield case("long", "32 bytes", program(b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000))
    yield case("long-length", "announces", program(b"\x8b\xff\xff\xff\x7f"), DAMAGED)
    yield case("text-length", "announces", program(b"X\xff\xff\xff\xff"), DAMAGED)
    yield case("bytes8-length", "announces", program(b"\x8e" + b"\xff" * 8, protocol=4), DAMAGED)
    yield case("bytearray8-length", "announces", program(b"\x96" + b"\x7f" * 8, protocol=5), DAMAGED)
    yield case("memo-index", "memo index of 1,000,000 or more", program(b"Nr\xff\xff\xff\xff"))
    yield case("decimal", "line without an end", program(b"I" + b"9" * 1_000_000 + b"\n"), DAMAGED)
    yield case("too-long", "longer than", program(b"N0" * 40 + text("a" * 70_000_000)))
    yield case("frame", "a frame of", program(b"\x95" + b"\xff" * 8 + b"N", protocol=4)[:-1], DAMAGED)
    yield case("empty-stack", "empty stack", program(b"2"), DAMAGED)
    yield case("pop-nothing", "mark", program(b"0"), DAMAGED)
    yield case("bare-stop", "empty stack", program(), DAMAGED)
    yield case("no-mark", "mark", program(b"t"), DAMAGED)
    yield case("unknown-opcode", "unknown opcode", program(b"\xff"), DAMAGED)
    yield case("special-items", "key without", program(b"}(Nu"), DAMAGED)
    yield case("reduce-without-tuple", "not a tuple", program(name("collections", "OrderedDict"), b"]R"), DAMAGED)


# ---- tensors with an invalid position, size or type


def _invalid_tensors() -> Iterator[tuple[Case, bytes]]:
    def case(case_name: str, verdict: str, message: str, value: bytes, *storages: bytes) -> tuple[Case, bytes]:
        return Case(f"tensor-{case_name}.ckpt", verdict, message), a.torch_zip(
            program(dict_of(text("w"), value)), *storages
        )

    four = a.storage()
    yield case("more-than-stored", DAMAGED, "16 bytes", tensor(a.storage(count=1000), (1000,), (1,)))
    yield case("less-than-stored", DAMAGED, "16 bytes", tensor(a.storage(count=2), (2,), (1,)))
    yield case("count-overflow", DAMAGED, "16 bytes", tensor(a.storage(count=2**62 + 4), (4,), (1,)))
    yield case("past-end", DAMAGED, "needs 20 bytes", tensor(four, (5,), (1,)))
    yield case("offset-past-end", DAMAGED, "needs", tensor(four, (2, 2), (2, 1), offset=1))
    yield case("stride-past-end", DAMAGED, "needs", tensor(four, (2, 2), (3, 1)))
    yield case("shape-overflow", DAMAGED, "needs", tensor(four, (2**32, 2**32), (1, 1)))
    yield case("negative-offset", DAMAGED, "whole numbers", tensor(four, offset=-1))
    yield case("negative-size", DAMAGED, "whole numbers", tensor(four, (-1, 2)))
    yield case("negative-stride", DAMAGED, "whole numbers", tensor(four, (2,), (-1,), offset=1))
    yield case("huge-size", DAMAGED, "whole numbers", tensor(four, (2**70,), (0,)))
    yield case("expand-bomb", UNSAFE, "would expand", tensor(four, (10**9,), (0,)))
    yield case("expand-bomb-2d", UNSAFE, "would expand", tensor(four, (10**6, 10**6), (0, 0)))
    yield case("dimensions", UNSAFE, "dimensions", tensor(four, (1,) * 100, (1,) * 100))
    yield case("uneven-stride", DAMAGED, "whole numbers", tensor(four, (2, 2), (1,)))
    sizes = tuple_of(b"G" + struct.pack(">d", 2.0))
    hooks = call("collections", "OrderedDict")
    fraction = call("torch._utils", "_rebuild_tensor_v2", four, number(0), sizes, tuple_of(number(1)), b"\x89", hooks)
    yield case("fraction-size", DAMAGED, "whole numbers", fraction)
    truth = call(
        "torch._utils", "_rebuild_tensor_v2", four, number(0), tuple_of(b"\x88"), tuple_of(number(1)), b"\x89", hooks
    )
    yield case("truth-size", DAMAGED, "whole numbers", truth)
    yield case("missing-storage", DAMAGED, "has no storage '1'", tensor(a.storage("1")))
    yield case("path-storage", DAMAGED, "has no storage", tensor(a.storage("../../../etc/passwd")))
    yield case("digit-storage", DAMAGED, "has no storage", tensor(a.storage("\N{ARABIC-INDIC DIGIT ZERO}")))
    yield case("two-dtypes", DAMAGED, "16 bytes", tuple_of(tensor(four), tensor(a.storage(kind="IntStorage"))))
    yield case("quantized", FILE, "QInt8Storage", tensor(a.storage(kind="QInt8Storage")))
    yield case("complex128", FILE, "ComplexDoubleStorage", tensor(a.storage(kind="ComplexDoubleStorage")))
    yield case("no-storage", DAMAGED, "PyTorch never writes", tensor(b"N"))
    yield case("wrong-id", DAMAGED, "not a tensor storage", tensor(number(3) + b"Q"))
    yield case(
        "too-few-arguments",
        DAMAGED,
        "PyTorch never writes",
        call("torch._utils", "_rebuild_tensor_v2", four),
    )
    yield case("same-name", DAMAGED, "two of its tensors", dict_of(
        text("a.b"), tensor(four), text("a"), dict_of(text("b"), tensor(four))))  # fmt: skip
    inline = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), tuple_of(number(0)), text("b"))
    kind = call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
    state = tuple_of(number(1), tuple_of(number(1000)), kind, b"\x89", b"C\x04abcd")
    yield case("numpy-short", DAMAGED, "needs 4000 bytes", inline + state + b"b")


# ---- zip archives that different programs would read differently


def _invalid_zips() -> Iterator[tuple[Case, bytes]]:
    def case(case_name: str, verdict: str, message: str, content: bytes) -> tuple[Case, bytes]:
        return Case(f"zip-{case_name}.ckpt", verdict, message), content

    def changed(index: int = 2, **changes: object) -> bytes:
        members = a.torch_members()
        for key, value in changes.items():
            setattr(members[index], key, value)
        return a.zip_archive(*members)

    good = a.torch_zip()
    members = a.torch_members()
    evil = program(call("os", "system", text("true")))
    yield case("two-pickles", UNSAFE, "two entries", a.zip_archive(*members, Member("archive/data.pkl", evil)))
    yield case("two-roots", UNSAFE, "2 pickles", a.zip_archive(*members, Member("other/data.pkl", evil)))
    yield case("case", UNSAFE, "two entries", a.zip_archive(*members, Member("archive/DATA.PKL", evil)))
    yield case("hidden", UNSAFE, "gap", a.zip_archive(Member("archive/data.pkl", evil, hidden=True), *members))
    yield case("hidden-last", UNSAFE, "belong to no", a.zip_archive(*members, Member("archive/x", evil, hidden=True)))
    yield case("gap", UNSAFE, "gap", a.zip_archive(*members, between=b"hello"))
    yield case("overlap", UNSAFE, "overlaps", changed(3, central_offset=0, central_name="archive/data.pkl2"))
    yield case("compressed-pickle", UNSAFE, "compressed", changed(0, method=8))
    yield case("compressed-bomb", UNSAFE, "compressed", changed(2, method=8, data=bytes(50_000_000)))
    yield case("name", UNSAFE, "differs", changed(central_name="archive/data/9"))
    yield case("size", UNSAFE, "", changed(central_size=8))
    yield case("local-size", UNSAFE, "differs", changed(local_size=8))
    yield case("method", UNSAFE, "differs", changed(local_method=8))
    yield case("checksum-two-ways", UNSAFE, "differs", changed(0, central_crc=7))
    wrong = a.zip_archive(*members).replace(struct.pack("<I", zlib.crc32(members[0].data)), b"\1\2\3\4")
    yield case("checksum", DAMAGED, "checksum", wrong)
    yield case("encrypted", UNSAFE, "encrypted", changed(flags=1))
    yield case("strong-encryption", UNSAFE, "encrypted", changed(flags=64))
    yield case("comment", DAMAGED, "after the end", a.zip_archive(*members, comment=b"hello"))
    yield case("trailing", DAMAGED, "after the end", good + b"hello")
    yield case("prefix", NOT_A_MODEL, "", b"#!/bin/sh\n" + good)
    yield case("count", DAMAGED, "ends after", a.zip_archive(*members, count=9))
    yield case("count-less", DAMAGED, "bytes after its last record", a.zip_archive(*members, count=1))
    yield case("no-pickle", NOT_A_MODEL, "not a PyTorch file", a.zip_archive(Member("a.txt", b"hello")))
    yield case("ordinary", NOT_A_MODEL, "ordinary zip", a.zip_archive(Member("a.txt", b"hello" * 99, method=8)))
    yield case("byteorder", DAMAGED, "neither 'little' nor 'big'", a.torch_zip(order="middle"))
    yield case("after-pickle", DAMAGED, "after the end of the pickle", a.torch_zip(a.good_pickle() + b"N."))
    yield case("truncated", DAMAGED, "incomplete", good[: len(good) // 2])
    yield case("truncated-end", DAMAGED, "incomplete", good[:-1])
    yield case("directory-moved", DAMAGED, "directory", good[:-22] + b"hello" + good[-22:])
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 3, 1)
    yield case("zip64-locator", DAMAGED, "zip64", good[:-22] + locator + good[-22:])
    end = struct.unpack("<4s4H2IH", good[-22:])
    huge = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 10**9, 10**9, end[5], end[6])
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(good) - 22, 1)
    ones = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, end[5], end[6], 0)
    yield case("zip64-count", UNSAFE, "zip entries", good[:-22] + huge + locator + ones)


# ---- the older formats


def _invalid_legacy() -> Iterator[tuple[Case, bytes]]:
    def case(case_name: str, verdict: str, message: str, content: bytes) -> tuple[Case, bytes]:
        return Case(f"legacy-{case_name}.pt", verdict, message), content

    pickle = a.legacy_pickle()
    good = a.legacy(pickle, ["77"], (4, FLOATS))
    yield case("truncated", DAMAGED, f"{len(good) - 5} of {len(good)} bytes", good[:-5])
    yield case("trailing", DAMAGED, "5 bytes after", good + b"hello")
    yield case("count", DAMAGED, "3 elements", a.legacy(pickle, ["77"], (3, FLOATS)))
    yield case("count-huge", DAMAGED, "elements", a.legacy(pickle, ["77"], (2**62, FLOATS)))
    yield case("unlisted", DAMAGED, "its pickle refers to", a.legacy(pickle, [], (4, FLOATS)))
    yield case(
        "listed-twice", DAMAGED, "its pickle refers to", a.legacy(pickle, ["77", "77"], (4, FLOATS), (4, FLOATS))
    )
    yield case("listed-more", DAMAGED, "its pickle refers to", a.legacy(pickle, ["77", "78"], (4, FLOATS), (4, FLOATS)))
    yield case(
        "no-keys", DAMAGED, "list of its storages", good.replace(program(list_of(text("77"))), program(number(3)))
    )
    two = program(list_of(tensor(a.storage("77", 4, extra=b"N")), tensor(a.storage("77", 5, extra=b"N"))))
    yield case("two-counts", DAMAGED, "two ways", a.legacy(two, ["77"], (4, FLOATS)))
    window = tuple_of(text("78"), number(2), number(3))
    outside = program(list_of(tensor(a.storage("77", 4, extra=window), (2,), (1,))))
    yield case("window", DAMAGED, "outside", a.legacy(outside, ["77"], (4, FLOATS)))
    yield case("version", DAMAGED, "unknown version", program(number(a.MAGIC)) + program(number(1002)))
    yield case("head-only", DAMAGED, "STOP", program(number(a.MAGIC)))
    yield case("plain-with-storage", DAMAGED, "not in this file", a.good_pickle())
    yield case("tar-count", DAMAGED, "ends within", a.torch_tar(count=2**40))
    yield case("tar-truncated", DAMAGED, "incomplete", a.torch_tar()[:600])
    yield case("tar-part", DAMAGED, "its entry", a.tar_archive(storages=b"", tensors=b""))
    yield case("tar-view", DAMAGED, "refers to a tensor", a.torch_tar(program(text("23") + b"Q")))
    # The keys are equal modulo 2^61 - 1, Python's modulus for hashing numbers.
    views = [tuple_of(number(12 + n * (2**61 - 1)), *map(number, (11, 0, 1))) for n in range(20_000)]
    yield case("tar-colliding-keys", DAMAGED, "list of storage views", a.torch_tar(None, 4, FLOATS, *views))
    yield case("tar-twice", UNSAFE, "two tar entries", a.torch_tar()[:-1024] + a.torch_tar())
    yield case("tar-other", NOT_A_MODEL, "tar archive", a.tar_archive(hello=b"world"))


# ---- safetensors headers


def _invalid_safetensors() -> Iterator[tuple[Case, bytes]]:
    def case(case_name: str, message: str, content: bytes, verdict: str = DAMAGED) -> tuple[Case, bytes]:
        return Case(f"st-{case_name}.safetensors", verdict, message), content

    def one(**fields: str) -> bytes:
        return a.safetensors("{" + a.entry(**fields) + "}", FLOATS)

    good = one()
    yield case("truncated", f"{len(good) - 4} of {len(good)} bytes", good[:-4])
    yield case("truncated-header", "incomplete", good[:20])
    yield case("too-short", "", b"\x10\0\0")
    yield case("trailing", "belong to no tensor", good + b"hell")
    yield case("long-header", "100 MB", a.safetensors("{" + a.entry() + "}", FLOATS, length=2**63))
    yield case("header-101-mb", "100 MB", a.safetensors("{" + a.entry() + "}", FLOATS, length=101_000_000))
    yield case("past-header", "incomplete", a.safetensors("{" + a.entry() + "}", FLOATS, length=5000))
    yield case("space-first", "begin with '{'", a.safetensors(" {" + a.entry() + "}", FLOATS))
    yield case("bom", "begin with '{'", a.safetensors(b"\xef\xbb\xbf{" + a.entry().encode() + b"}", FLOATS))
    yield case("no-json", "JSON", a.safetensors("{" + a.entry() + "]", FLOATS))
    yield case("after-brace", "closing brace", a.safetensors("{" + a.entry() + "} x", FLOATS))
    yield case("nul-padding", "closing brace", a.safetensors("{" + a.entry() + "}\0\0", FLOATS))
    yield case("twice", "twice", a.safetensors("{" + a.entry() + "," + a.entry() + "}", FLOATS))
    twice = '{"w":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    yield case("field-twice", "JSON", a.safetensors(twice, FLOATS))
    meta = '"__metadata__":{"a":"b"}'
    yield case("metadata-twice", "twice", a.safetensors("{" + meta + "," + meta + "," + a.entry() + "}", FLOATS))
    yield case("metadata-key-twice", "twice", a.safetensors('{"__metadata__":{"a":"b","a":"c"}}'))
    yield case("metadata-number", "not text", a.safetensors('{"__metadata__":{"a":1}}'))
    yield case("metadata-list", "JSON", a.safetensors('{"__metadata__":["a"]}'))
    yield case("metadata-nested", "not text", a.safetensors('{"__metadata__":{"a":{"b":"c"}}}'))
    yield case("surrogate", "Unicode", a.safetensors('{"__metadata__":{"a":"\\ud800"}}'))
    yield case("surrogate-name", "Unicode", one(name="\\udfff"))
    yield case("not-utf8", "Unicode", a.safetensors(b'{"\xff\xfe":' + a.entry().encode()[4:] + b"}", FLOATS))
    yield case("control-character", "text", a.safetensors('{"__metadata__":{"a":"\n"}}'))
    yield case("deep", "dtype, shape", a.safetensors('{"w":' + "[" * 500_000))
    yield case("deep-object", "dtype, shape", a.safetensors('{"w":' + '{"a":' * 200_000))
    yield case("dtype", "unknown dtype", one(dtype="F33"))
    yield case("dtype-packed", "unknown dtype", one(dtype="F4"))
    yield case("dtype-lower", "unknown dtype", one(dtype="f32"))
    yield case("shape-negative", "shape", one(shape="[-2,-2]"))
    yield case("shape-fraction", "shape", one(shape="[2.0,2.0]"))
    yield case("shape-truth", "shape", one(shape="[true,4]"))
    yield case("shape-text", "shape", one(shape='"22"'))
    yield case("shape-overflow", "needs", one(shape=f"[{2**62},{2**62}]"))
    yield case("shape-wraps", "needs", one(shape=f"[{2**63 - 1},2]"))
    yield case("shape-big-number", "shape", one(shape=f"[{10**3000}]"))
    yield case("shape-dimensions", "shape", one(shape="[" + ",".join("1" * 40) + "]"))
    yield case("offsets-backwards", "needs", one(offsets="[16,0]"))
    yield case("offsets-one", "data_offsets", one(offsets="[16]"))
    yield case("offsets-past", "incomplete", one(shape="[8]", offsets="[0,32]"))
    yield case("offsets-size", "needs 16 bytes", one(offsets="[0,15]"))
    yield case("gap-first", "gap", one(shape="[3]", offsets="[4,16]"))
    two = "{" + a.entry("a", shape="[2]", offsets="[0,8]") + "," + a.entry("b", shape="[2]", offsets="{}") + "}"
    yield case("overlap", "overlaps", a.safetensors(two.replace('"{}"', "").replace("{}", "[4,12]"), FLOATS[:12]))
    yield case("gap", "gap", a.safetensors(two.replace("{}", "[12,20]"), bytes(20)))
    yield case("missing-shape", "shape", a.safetensors('{"w":{"dtype":"F32","data_offsets":[0,16]}}', FLOATS))
    yield case("many-tensors", "tensors", a.safetensors(
        "{" + ",".join(a.entry(f"{i:x}", shape="[0]", offsets="[0,0]") for i in range(250_000)) + "}"
    ), UNSAFE)  # fmt: skip
    yield case("much-metadata", "names and metadata", a.safetensors(
        '{"__metadata__":{"a":"' + "a" * 40_000_000 + '\N{SMILING FACE WITH HORNS}"}}'), UNSAFE)  # fmt: skip
    yield case("html", "web page", b"<!DOCTYPE html><html><body>Sign in</body></html>", NOT_A_MODEL)


# ---- paths that are not regular files


def _special_files(folder: Path) -> list[Case]:
    cases = []
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "special-fifo.ckpt")
        cases.append(Case("special-fifo.ckpt", NOT_A_MODEL, "named pipe"))
        for link, target, verdict, message in [
            ("special-endless.ckpt", "/dev/zero", NOT_A_MODEL, "a device"),
            ("special-terminal.ckpt", "/dev/tty", FILE, ""),
            ("special-null.safetensors", "/dev/null", NOT_A_MODEL, "a device"),
            ("special-dangling.ckpt", "nowhere", FILE, "does not exist"),
            ("special-loop.ckpt", "special-loop.ckpt", FILE, "cannot be read"),
        ]:
            (folder / link).symlink_to(target)
            cases.append(Case(link, verdict, message))
    (folder / "special-folder.ckpt").mkdir()
    cases.append(Case("special-folder.ckpt", NOT_A_MODEL, "a folder without a model"))
    cases.append(Case("special-absent.ckpt", FILE, "does not exist"))
    return cases
