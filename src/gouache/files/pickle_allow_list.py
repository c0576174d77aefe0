"""The allow-list: every global that a pickle may call, with a small pure function that computes the result.

The result is the position of a tensor in the file, a dictionary, a number, a path, or a `Record` for an object of a
known harmless class. Covered are the objects that torch, numpy, Lightning and OmegaConf write; none of these packages
is needed to read them. A file that names a global that is not in the tables at the end of this file is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gouache.errors import FileError, PickleFinding, UnsafeFile
from gouache.files.pickle_machine import AllowList, Call, Global, Persistent, argument_text, type_label
from gouache.files.pickle_tree import CallHandler, FindStorage, Record, TreeBuilder
from gouache.files.stored import DTYPES, MAX_DIMENSIONS, STORAGE_TYPES, Storage, StoredTensor, view

# ---- tensors


def _storage(tree: TreeBuilder, node: Any, call: Call) -> Storage:
    found = tree.find_storage(node.id) if isinstance(node, Persistent) else None
    if not isinstance(found, Storage):
        raise tree.wrong(call)
    return found


def _tensor(tree: TreeBuilder, call: Call, depth: int) -> StoredTensor:
    """torch._utils._rebuild_tensor(storage, offset, size, stride); _v2 adds three, of which metadata must be empty."""
    storage, offset, size, stride, _, _, metadata = tree.args(call, 4, 7)
    if metadata:
        raise UnsafeFile(tree.path, "holds a tensor that is stored as its negative or conjugate: refused")
    storage = _storage(tree, storage, call)
    return view(tree.path, storage, storage.dtype, offset, _size(size), _size(stride))


def _tensor_v3(tree: TreeBuilder, call: Call, depth: int) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3: the storage is untyped, the dtype is an argument."""
    storage, offset, size, stride, _, _, dtype, metadata = tree.args(call, 7, 8)
    if metadata:
        raise UnsafeFile(tree.path, "holds a tensor that is stored as its negative or conjugate: refused")
    if not isinstance(dtype, Global) or dtype not in DTYPES:
        raise FileError(tree.path, f"holds a tensor of the unsupported dtype {type_label(dtype)}")
    return view(tree.path, _storage(tree, storage, call), DTYPES[dtype], offset, _size(size), _size(stride))


def _size(node: Any) -> Any:
    """A size is a tuple, or a torch.Size of a tuple."""
    return node.args[0] if isinstance(node, Call) and node.name == _SIZE and len(node.args) == 1 else node


def _parameter(tree: TreeBuilder, call: Call, depth: int) -> Any:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks[, state]) -> the data."""
    return tree.value(tree.args(call, 3, 4)[0], depth)


def _of_type(tree: TreeBuilder, call: Call, depth: int) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, args, state): a tensor with Python attributes."""
    function, kind, args, _ = tree.args(call, 4, 4)
    plain = isinstance(function, Global) and function in _TENSORS and isinstance(kind, Global) and kind in _TENSOR_TYPES
    if not plain or not isinstance(args, tuple):
        raise UnsafeFile(
            tree.path,
            f"its pickle calls {type_label(function)} to make a tensor of type {type_label(kind)}: refused. "
            "Weights need no code: get a .safetensors file instead",
            (PickleFinding(type_label(function), None),),
        )
    return tree.value(Call(function, args), depth)


# ---- numpy

_NUMPY_DTYPES = {
    "f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8",
    "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL", "c8": "C64",
}  # fmt: skip
_WIDTHS = {
    "F64": "d", "F32": "f", "F16": "e", "BF16": "H", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U64": "Q",
    "U32": "I", "U16": "H", "U8": "B", "BOOL": "?", "C64": "ff",
}  # fmt: skip


def _numpy_dtype(node: Any) -> tuple[str | None, bool]:
    """(name of the dtype as in `ITEM_SIZE` or None, whether it is big-endian) of a pickled numpy.dtype."""
    if not isinstance(node, Call) or node.name != _NUMPY_DTYPE or not node.args:
        return None, False
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "<"
    code = node.args[0]
    if not isinstance(code, str):
        return None, False
    return _NUMPY_DTYPES.get(code.lstrip("<>|=")), order == ">" or code.startswith(">")


_NEEDS_INIT = 8  # the only flag of texts; objects have more
_PLAIN_DTYPE = re.compile(r"[<>|=]?(?:[biufcSUVmM]\d{0,5}|\?)")


def _dtype_fault(call: Call) -> str:
    """What is wrong with a numpy.dtype: only plain ones have no fields, no objects and no data type inside.

    An array or a scalar of objects has another pickle as its bytes. The state is (version, byte order, data type
    inside, names, fields, size, alignment, flags[, metadata of dates]).
    """
    code = call.args[0] if call.args else None
    if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
        return f"of {argument_text(code)}"
    state = call.state
    if not call.built or (state is None):
        return ""
    plain = isinstance(state, tuple) and len(state) in (8, 9) and state[1] in ("<", ">", "|", "=")
    if (
        not plain
        or state[2:5] != (None, None, None)
        or not all(type(n) is int for n in state[5:8])
        or state[7] & ~_NEEDS_INIT
    ):
        return "with a state that plain numbers do not have"
    if len(state) == 9 and code.lstrip("<>|=")[:1] not in "mM":
        return "with metadata"
    return ""


def _encode_fault(call: Call) -> str:
    """`_codecs.encode` imports the module of an encoding that it does not know."""
    encodings = ("latin1", "latin-1")
    return "" if not call.args[1:] or call.args[1] in encodings else f"as {argument_text(call.args[1])}"


def _numpy_scalar(tree: TreeBuilder, call: Call, depth: int) -> Any:
    """numpy.core.multiarray.scalar(dtype, bytes) -> a number, or a record if the dtype is not numeric."""
    kind, raw = tree.args(call, 1, 2)
    dtype, big = _numpy_dtype(kind)
    if dtype is None or raw is None:
        return Record("numpy.scalar")
    form = (">" if big else "<") + _WIDTHS[dtype]
    raw = tree.bytes_of(raw, call, depth)
    if len(raw) != struct.calcsize(form):
        raise tree.wrong(call)
    numbers = struct.unpack(form, raw)
    return complex(*numbers) if dtype == "C64" else numbers[0]


def _numpy_array(tree: TreeBuilder, call: Call, depth: int) -> Any:
    """numpy.core.multiarray._reconstruct, followed by the state (version, shape, dtype, Fortran order, bytes)."""
    state = call.state
    if not isinstance(state, tuple) or len(state) != 5 or isinstance(state[4], list):
        return Record("numpy.ndarray")
    return _array(tree, call, depth, *state[1:])


def _numpy_from_buffer(tree: TreeBuilder, call: Call, depth: int) -> Any:
    """numpy.core.numeric._frombuffer(bytes, dtype, shape, order), which pickle protocol 5 uses."""
    raw, dtype, shape, order = tree.args(call, 4, 4)
    return _array(tree, call, depth, shape, dtype, order == "F", raw)


def _array(tree: TreeBuilder, call: Call, depth: int, shape: Any, dtype: Any, fortran: Any, raw: Any) -> Any:
    name, big = _numpy_dtype(dtype)
    if name is None or not isinstance(shape, tuple):
        return Record("numpy.ndarray")
    if len(shape) > MAX_DIMENSIONS:
        raise tree.wrong(call)
    inline = tree.bytes_of(raw, call, depth)
    storage = Storage(name, 0, len(inline), big, inline)
    stride, step = [], 1
    for n in shape if fortran else reversed(shape):
        stride.append(step)
        step = step * n if type(n) is int else step
    found = view(tree.path, storage, name, 0, shape, tuple(stride if fortran else reversed(stride)))
    if found.info.nbytes != len(inline):
        raise tree.wrong(call)
    return found


# ---- plain containers and values


def _mapping(tree: TreeBuilder, call: Call, depth: int) -> dict[Any, Any]:
    """A dictionary of any class, made empty, from a dictionary or from pairs. A default factory is ignored."""
    result: dict[Any, Any] = {}
    for source in tree.value(call.args, depth):
        if isinstance(source, dict):
            result |= source
        elif isinstance(source, list):
            for pair in source:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise tree.wrong(call)
                result[tree.key(pair[0])] = pair[1]
    return result | tree.value(call.entries or {}, depth)


def _elements(tree: TreeBuilder, call: Call, depth: int) -> list[Any]:
    """Elements of a list, tuple, set or deque: of its first argument (a deque's second is a length), then the added."""
    first = tree.value(call.args[0], depth) if call.args else []
    if not isinstance(first, list | tuple | set):
        raise tree.wrong(call)
    return [*first, *tree.value(call.elements or [], depth)]


def _list(tree: TreeBuilder, call: Call, depth: int) -> list[Any]:
    return _elements(tree, call, depth)


def _tuple(tree: TreeBuilder, call: Call, depth: int) -> tuple[Any, ...]:
    return tuple(_elements(tree, call, depth))


def _set(tree: TreeBuilder, call: Call, depth: int) -> set[Any]:
    return {tree.key(element) for element in _elements(tree, call, depth)}


def _bytes(tree: TreeBuilder, call: Call, depth: int) -> bytes:
    """bytes() or bytearray(bytes), or bytes as Python 2's protocol writes them: _codecs.encode(text, 'latin1')."""
    content, encoding = tree.args(call, 0, 2)
    content = b"" if content is None else tree.value(content, depth)
    if isinstance(content, str) and encoding in ("latin1", "latin-1"):
        tree.charge(1, len(content))
        try:
            content = content.encode("latin-1")
        except UnicodeEncodeError:
            raise tree.wrong(call) from None
    if not isinstance(content, bytes):
        raise tree.wrong(call)
    return content


def _complex(tree: TreeBuilder, call: Call, depth: int) -> complex:
    if not all(isinstance(part, float | int) for part in call.args) or len(call.args) != 2:
        raise tree.wrong(call)
    return complex(*call.args)


def _path(tree: TreeBuilder, call: Call, depth: int) -> str:
    parts = [part for part in call.args if isinstance(part, str)]
    tree.charge(len(parts), sum(map(len, parts)))
    slash = "\\" if "Windows" in call.name.name else "/"
    return slash.join(part.rstrip(slash) if part.rstrip(slash) else "" for part in parts) or "."


def _device(tree: TreeBuilder, call: Call, depth: int) -> str:
    kind, index = tree.args(call, 1, 2)
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise tree.wrong(call)
    return kind if index is None else f"{kind}:{index}"


def _first_text(tree: TreeBuilder, call: Call, depth: int) -> str:
    first = call.args[0] if call.args else None
    if not isinstance(first, str):
        raise tree.wrong(call)
    return first


# ---- objects of known classes


def _record(tree: TreeBuilder, call: Call, depth: int) -> Record:
    return Record(str(call.name), tree.value(call.args, depth), tree.value(call.state, depth))


def _config(tree: TreeBuilder, call: Call, depth: int) -> Any:
    """The content of an OmegaConf container or node. The rest of its state refers back to its parents."""
    state = call.state if isinstance(call.state, dict) else {}
    for key in ("_content", "_val"):
        if key in state:
            return tree.value(state[key], depth)
    return Record(str(call.name))


def _parameters(tree: TreeBuilder, call: Call, depth: int) -> Any:
    """The parameters, by name, of a torch ParameterDict or ParameterList."""
    state = call.state if isinstance(call.state, dict) else {}
    return tree.value(state.get("_parameters", {}), depth)


# ---- the table


def _table(*rows: tuple[CallHandler, str, str]) -> dict[Global, CallHandler]:
    """Rows of (function that computes the result, modules, names in each of these modules)."""
    return {
        Global(module, name): handler
        for handler, modules, names in rows
        for module in modules.split()
        for name in names.split()
    }


_BUILTINS = "builtins __builtin__"
_NUMPY_CORE = "numpy.core.multiarray numpy._core.multiarray"
_LIGHTNING = "pytorch_lightning.callbacks lightning.pytorch.callbacks"

_TENSORS = _table(
    (_tensor, "torch._utils", "_rebuild_tensor _rebuild_tensor_v2"),
    (_tensor_v3, "torch._utils", "_rebuild_tensor_v3"),
    (_parameter, "torch._utils", "_rebuild_parameter _rebuild_parameter_with_state"),
)
_TENSOR_TYPES = {
    Global("torch", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
    Global("torch.nn.parameter", "Buffer"),
}

# May be called; the results must not be given a state or contents.
_FUNCTIONS = _TENSORS | _table(
    (_of_type, "torch._tensor torch.tensor", "_rebuild_from_type _rebuild_from_type_v2"),
    (_device, "torch", "device"),
    (_tuple, "torch", "Size"),
    (_first_text, "torch.serialization", "_get_layout"),
    (_first_text, "torch.torch_version", "TorchVersion"),
    (_record, "torch.nn.backends.thnn", "_get_thnn_function_backend"),
    (_numpy_scalar, _NUMPY_CORE, "scalar"),
    (_numpy_from_buffer, "numpy.core.numeric numpy._core.numeric", "_frombuffer"),
    (_bytes, "_codecs", "encode"),
    (_bytes, _BUILTINS, "bytes bytearray"),
    (_complex, _BUILTINS, "complex"),
    (_tuple, _BUILTINS, "tuple"),
    (_record, _BUILTINS, "slice range xrange"),
    (_path, "pathlib pathlib._local", "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath"),
    (_record, "datetime", "date datetime time timedelta timezone"),
    (_record, "decimal", "Decimal"),
    (_record, "fractions", "Fraction"),
)

# May also be given a state, entries or elements.
_CLASSES = _table(
    (_set, _BUILTINS, "set frozenset"),
    (_mapping, _BUILTINS, "dict"),
    (_list, _BUILTINS, "list"),
    (_mapping, "collections", "OrderedDict defaultdict Counter"),
    (_list, "collections", "deque"),
    (_record, "argparse", "Namespace"),
    (_record, "types", "SimpleNamespace"),
    (_record, "uuid", "UUID"),
    (_record, "numpy", "dtype"),
    (_numpy_array, _NUMPY_CORE, "_reconstruct"),
    (_parameters, "torch.nn.modules.container", "ParameterDict ParameterList"),
    (_config, "omegaconf.dictconfig", "DictConfig"),
    (_config, "omegaconf.listconfig", "ListConfig"),
    (_config, "omegaconf.nodes", "AnyNode StringNode IntegerNode FloatNode BooleanNode PathNode BytesNode EnumNode"),
    (_record, "omegaconf.base", "Metadata ContainerMetadata"),
    (_mapping, "pytorch_lightning.utilities.parsing", "AttributeDict"),
    (_mapping, "lightning_fabric.utilities.data lightning.fabric.utilities.data", "AttributeDict"),
    (_record, f"{_LIGHTNING.replace('callbacks', 'callbacks.model_checkpoint')}", "ModelCheckpoint"),
    (_record, f"{_LIGHTNING.replace('callbacks', 'callbacks.early_stopping')}", "EarlyStopping"),
    (_record, f"{_LIGHTNING.replace('callbacks', 'callbacks.lr_monitor')}", "LearningRateMonitor"),
    (_record, f"{_LIGHTNING.replace('callbacks', 'callbacks.timer')}", "Timer"),
    (_mapping, "easydict", "EasyDict"),
    (_mapping, "addict.addict", "Dict"),
    (_mapping, "munch", "Munch"),
    (_mapping, "yacs.config", "CfgNode"),
)


_STORAGES = [
    f"{kind}Storage"
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat",
                 "ComplexDouble", "QInt8", "QUInt8", "QInt32")
]  # fmt: skip


class _Values:
    """Classes that files hold as values: default factories, types of tensors, types and keys of a configuration."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, Global) and (
            name in _PLAIN_VALUES or (_CLASS_MODULES.fullmatch(name.module) is not None and name.name[:1].isupper())
        )

    def __iter__(self) -> Iterator[Global]:
        """Those that are listed by name."""
        return iter(_PLAIN_VALUES)


_CLASS_MODULES = re.compile(
    r"torch\.nn\.modules\.\w{1,40}|(?:pytorch_lightning|lightning\.pytorch)\.callbacks(?:\.\w{1,40}){0,3}"
)
_PLAIN_VALUES = {
    *STORAGE_TYPES,
    *DTYPES,
    *_TENSOR_TYPES,
    # Of the oldest format, and those that are named in the message that they are not supported.
    *(Global("torch", name.replace("Storage", "Tensor")) for name in _STORAGES),
    *(Global(module, name) for module in ("torch", "torch.cuda") for name in _STORAGES),
    *(Global("torch", name) for name in ("complex32", "complex128", "qint8", "quint8", "qint32")),
    Global("numpy", "ndarray"),
    Global("typing", "Any"),
    *(
        Global(module, name)
        for module in _BUILTINS.split()
        for name in ("bool", "float", "int", "long", "str", "unicode")
    ),
}
_NUMPY_DTYPE = Global("numpy", "dtype")
_SIZE = Global("torch", "Size")

ALLOW_LIST = AllowList(
    functions=_FUNCTIONS,
    classes=_CLASSES,
    values=_Values(),
    checks={_NUMPY_DTYPE: _dtype_fault, Global("_codecs", "encode"): _encode_fault},
)


def build_tree(path: Path, value: Any, find_storage: FindStorage) -> Any:
    """The value of a pickle that was read with `ALLOW_LIST`, as a tree of plain values; see `TreeBuilder`."""
    return TreeBuilder(path, find_storage, _FUNCTIONS | _CLASSES).value(value, 0)
