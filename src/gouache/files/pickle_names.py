"""What honest pickles say: every name that one may use, with a small pure function for what it stands for.

A tensor's place in the file, a dictionary, a number, a path, or a `Record` for an object of a known harmless class:
as torch, numpy, Lightning and OmegaConf write them, none of which is needed to read them. A name that is not in the
tables at the end of this file may be mentioned, and gets the file refused when it is called.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from gouache.errors import Asked, FileError, UnsafeFile
from gouache.files.pickle_machine import Call, Name, Persistent, Vocabulary, noun
from gouache.files.pickle_values import FindStorage, Meaning, Record, Unfolding
from gouache.files.stored import DTYPES, MAX_DIMENSIONS, STORAGE_TYPES, Storage, StoredTensor, view

# ---- tensors


def _storage(u: Unfolding, node: Any, call: Call) -> Storage:
    found = u.find_storage(node.id) if isinstance(node, Persistent) else None
    if not isinstance(found, Storage):
        raise u.wrong(call)
    return found


def _tensor(u: Unfolding, call: Call, depth: int) -> StoredTensor:
    """torch._utils._rebuild_tensor(storage, offset, size, stride), and _v2 with three arguments that do not matter."""
    storage, offset, size, stride, _, _, metadata = u.args(call, 4, 7)
    if metadata:
        raise UnsafeFile(u.path, "holds a tensor stored as its negative or conjugate: refused")
    storage = _storage(u, storage, call)
    return view(u.path, storage, storage.dtype, offset, _size(size), _size(stride))


def _tensor_v3(u: Unfolding, call: Call, depth: int) -> StoredTensor:
    """torch._utils._rebuild_tensor_v3: the dtype is given beside an untyped storage."""
    storage, offset, size, stride, _, _, dtype, metadata = u.args(call, 7, 8)
    if metadata:
        raise UnsafeFile(u.path, "holds a tensor stored as its negative or conjugate: refused")
    if not isinstance(dtype, Name) or dtype not in DTYPES:
        raise FileError(u.path, f"holds a tensor of the unsupported dtype {noun(dtype)}")
    return view(u.path, _storage(u, storage, call), DTYPES[dtype], offset, _size(size), _size(stride))


def _size(node: Any) -> Any:
    """A size is a tuple, or a torch.Size of one."""
    return node.args[0] if isinstance(node, Call) and node.name == _SIZE and len(node.args) == 1 else node


def _parameter(u: Unfolding, call: Call, depth: int) -> Any:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks[, state]): the data."""
    return u.value(u.args(call, 3, 4)[0], depth)


def _of_type(u: Unfolding, call: Call, depth: int) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, args, state): a tensor with attributes of its own."""
    function, kind, args, _ = u.args(call, 4, 4)
    plain = isinstance(function, Name) and function in _TENSORS and isinstance(kind, Name) and kind in _TENSOR_TYPES
    if not plain or not isinstance(args, tuple):
        raise UnsafeFile(
            u.path,
            f"asks for {noun(function)} to be run to make a tensor of the kind {noun(kind)}: refused. Weights need "
            "no code: get a .safetensors file instead",
            (Asked(noun(function), None),),
        )
    return u.value(Call(function, args), depth)


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
    """(our name of the dtype or None, whether it is big-endian) of a pickled numpy.dtype."""
    if not isinstance(node, Call) or node.name != _NUMPY_DTYPE or not node.args:
        return None, False
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "<"
    code = node.args[0]
    if not isinstance(code, str):
        return None, False
    return _NUMPY_DTYPES.get(code.lstrip("<>|=")), order == ">" or code.startswith(">")


def _numpy_scalar(u: Unfolding, call: Call, depth: int) -> Any:
    """numpy.core.multiarray.scalar(dtype, bytes): a number; of a type that is no number, a record."""
    kind, raw = u.args(call, 1, 2)
    dtype, big = _numpy_dtype(kind)
    if dtype is None or raw is None:
        return Record("numpy.scalar")
    form = (">" if big else "<") + _WIDTHS[dtype]
    raw = u.bytes_of(raw, call, depth)
    if len(raw) != struct.calcsize(form):
        raise u.wrong(call)
    numbers = struct.unpack(form, raw)
    return complex(*numbers) if dtype == "C64" else numbers[0]


def _numpy_array(u: Unfolding, call: Call, depth: int) -> Any:
    """numpy.core.multiarray._reconstruct, then the state (version, shape, dtype, Fortran order, bytes)."""
    state = call.state
    if not isinstance(state, tuple) or len(state) != 5 or isinstance(state[4], list):
        return Record("numpy.ndarray")
    return _array(u, call, depth, *state[1:])


def _numpy_from_buffer(u: Unfolding, call: Call, depth: int) -> Any:
    """numpy.core.numeric._frombuffer(bytes, dtype, shape, order), pickle protocol 5's way."""
    raw, dtype, shape, order = u.args(call, 4, 4)
    return _array(u, call, depth, shape, dtype, order == "F", raw)


def _array(u: Unfolding, call: Call, depth: int, shape: Any, dtype: Any, fortran: Any, raw: Any) -> Any:
    name, big = _numpy_dtype(dtype)
    if name is None or not isinstance(shape, tuple):
        return Record("numpy.ndarray")
    if len(shape) > MAX_DIMENSIONS:
        raise u.wrong(call)
    inline = u.bytes_of(raw, call, depth)
    storage = Storage(name, 0, len(inline), big, inline)
    stride, step = [], 1
    for n in shape if fortran else reversed(shape):
        stride.append(step)
        step = step * n if type(n) is int else step
    found = view(u.path, storage, name, 0, shape, tuple(stride if fortran else reversed(stride)))
    if found.info.nbytes != len(inline):
        raise u.wrong(call)
    return found


# ---- plain containers and values


def _mapping(u: Unfolding, call: Call, depth: int) -> dict[Any, Any]:
    """A dictionary of any kind: made empty and filled, or of another, or of pairs; a default factory is left out."""
    result: dict[Any, Any] = {}
    for source in u.value(call.args, depth):
        if isinstance(source, dict):
            result |= source
        elif isinstance(source, list):
            for pair in source:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise u.wrong(call)
                result[u.key(pair[0])] = pair[1]
    return result | u.value(call.entries or {}, depth)


def _elements(u: Unfolding, call: Call, depth: int) -> list[Any]:
    """Of a list, tuple, set or deque: those of its first argument (a deque's second is a length), and the added."""
    first = u.value(call.args[0], depth) if call.args else []
    if not isinstance(first, list | tuple | set):
        raise u.wrong(call)
    return [*first, *u.value(call.elements or [], depth)]


def _list(u: Unfolding, call: Call, depth: int) -> list[Any]:
    return _elements(u, call, depth)


def _tuple(u: Unfolding, call: Call, depth: int) -> tuple[Any, ...]:
    return tuple(_elements(u, call, depth))


def _set(u: Unfolding, call: Call, depth: int) -> set[Any]:
    return {u.key(element) for element in _elements(u, call, depth)}


def _bytes(u: Unfolding, call: Call, depth: int) -> bytes:
    """bytes() or bytearray(bytes), or how Python 2's protocol spells bytes: _codecs.encode(text, 'latin1')."""
    content, encoding = u.args(call, 0, 2)
    content = b"" if content is None else u.value(content, depth)
    if isinstance(content, str) and encoding in ("latin1", "latin-1"):
        u.charge(1, len(content))
        try:
            content = content.encode("latin-1")
        except UnicodeEncodeError:
            raise u.wrong(call) from None
    if not isinstance(content, bytes):
        raise u.wrong(call)
    return content


def _complex(u: Unfolding, call: Call, depth: int) -> complex:
    if not all(isinstance(part, float | int) for part in call.args) or len(call.args) != 2:
        raise u.wrong(call)
    return complex(*call.args)


def _path(u: Unfolding, call: Call, depth: int) -> str:
    parts = [part for part in call.args if isinstance(part, str)]
    u.charge(len(parts), sum(map(len, parts)))
    slash = "\\" if "Windows" in call.name.name else "/"
    return slash.join(part.rstrip(slash) if part.rstrip(slash) else "" for part in parts) or "."


def _device(u: Unfolding, call: Call, depth: int) -> str:
    kind, index = u.args(call, 1, 2)
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise u.wrong(call)
    return kind if index is None else f"{kind}:{index}"


def _first_text(u: Unfolding, call: Call, depth: int) -> str:
    first = call.args[0] if call.args else None
    if not isinstance(first, str):
        raise u.wrong(call)
    return first


# ---- objects of known classes


def _record(u: Unfolding, call: Call, depth: int) -> Record:
    return Record(str(call.name), u.value(call.args, depth), u.value(call.state, depth))


def _config(u: Unfolding, call: Call, depth: int) -> Any:
    """An OmegaConf container or node: its content. The rest of its state points back at its parents."""
    state = call.state if isinstance(call.state, dict) else {}
    for key in ("_content", "_val"):
        if key in state:
            return u.value(state[key], depth)
    return Record(str(call.name))


def _parameters(u: Unfolding, call: Call, depth: int) -> Any:
    """A torch ParameterDict or ParameterList: its parameters by name."""
    state = call.state if isinstance(call.state, dict) else {}
    return u.value(state.get("_parameters", {}), depth)


# ---- the table


def _table(*rows: tuple[Meaning, str, str]) -> dict[Name, Meaning]:
    """Rows of (what it means, modules, names in each of these modules)."""
    return {
        Name(module, name): meaning
        for meaning, modules, names in rows
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
    Name("torch", "Tensor"),
    Name("torch.nn.parameter", "Parameter"),
    Name("torch.nn.parameter", "Buffer"),
}

# May be called; their results take no state and no contents.
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

_NUMPY_DTYPE = Name("numpy", "dtype")
_SIZE = Name("torch", "Size")

VOCABULARY = Vocabulary(
    functions=_FUNCTIONS,
    classes=_CLASSES,
    values={*STORAGE_TYPES, *DTYPES, *_TENSOR_TYPES, Name("numpy", "ndarray"), Name("typing", "Any")},
)


def unfold(path: Path, value: Any, find_storage: FindStorage) -> Any:
    """The value of a pickle that was read with `VOCABULARY`, as a tree; see `Unfolding`."""
    return Unfolding(path, find_storage, _FUNCTIONS | _CLASSES).value(value, 0)
