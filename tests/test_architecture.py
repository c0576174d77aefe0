"""The walls of the house, read from the code's own imports: who may import whom, and what nobody may."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gouache import errors

PACKAGE = Path(errors.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports from its own room and from lower floors, never from another room of its floor. `face` joins the rooms
# for callers in Python, the command line among them; `__init__` opens it, lazily.
HOUSE = (
    ("errors", "version"),
    ("nn", "diffusion"),
    ("files", "layouts", "images", "prompts"),
    ("families",),
    ("adapters", "captions"),
    ("model", "workshop"),
    ("generate", "training"),
    ("app",),
    ("face",),
    ("server",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOORS = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}

# Oracles of the tests, or what needs them; and torchvision, for which there is no CPU build that pip finds by itself.
FOREIGN = {"torchvision", "transformers", "diffusers", "accelerate", "hypothesis", "pytest", "emoji"}

CHANGES = {
    "append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault", "popitem", "add", "discard",
    "sort", "reverse", "appendleft", "popleft",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")


def room(path: Path) -> str:
    """The folder of the package that a file stands in; for files at its door, their own name."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path, tree: ast.AST) -> Iterator[str]:
    """The full name of every module that the code imports, wherever it does so, `TYPE_CHECKING` included."""
    package = ["gouache", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "gouache":  # `from gouache import nn` names a room in its list
                yield from (f"gouache.{alias.name}" for alias in node.names)
            else:
                yield origin


def rooms_imported(path: Path, source: str) -> set[str]:
    names = [name.split(".") for name in imported(path, ast.parse(source)) if name.split(".")[0] == "gouache"]
    rooms = {(name[1:] or ["__init__"])[0] for name in names}
    return {room if room in FLOORS else "__init__" for room in rooms}  # `from gouache import load` opens the face


def trespasses(path: Path, source: str) -> list[str]:
    """The rooms that `source`, standing at `path`, imports and may not."""
    own = room(path)
    return sorted(other for other in rooms_imported(path, source) if other != own and FLOORS[other] >= FLOORS[own])


def names_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_has_its_floor():
    assert {room(path) for path in FILES} <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=names_of)
def test_a_file_imports_only_lower_floors_and_its_own_room(path):
    assert trespasses(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=names_of)
def test_no_file_imports_what_belongs_to_the_tests(path):
    names = imported(path, ast.parse(path.read_text(encoding="utf-8")))

    assert not {name.split(".")[0] for name in names} & FOREIGN


@pytest.mark.parametrize(
    ("own", "line", "expected"),
    [
        ("nn/unet.py", "from gouache.diffusion.schedule import Schedule", ["diffusion"]),
        ("nn/unet.py", "from gouache.errors import ModelError\nfrom gouache.nn.blocks import ResBlock", []),
        ("diffusion/samplers/euler.py", "from ...nn import unet", ["nn"]),
        ("diffusion/samplers/euler.py", "from .sampler import step\nfrom ..schedule import Schedule", []),
        ("files/open.py", "import gouache.layouts.rules", ["layouts"]),
        ("adapters/lora.py", "from gouache import model, nn", ["model"]),
        ("workshop/merge.py", "def go():\n    from gouache.model.load import load", ["model"]),
        ("model/load.py", "if TYPE_CHECKING:\n    from gouache.app.settings import Settings", ["app"]),
        ("training/loop.py", "import gouache", ["__init__"]),
        ("generate/run.py", "from gouache import load", ["__init__"]),
        ("training/loop.py", "from gouache.generate.run import paint", ["generate"]),
        ("families/identify.py", "from gouache.adapters import read", ["adapters"]),
        ("cli/main.py", "from gouache.app import settings\nfrom gouache.version import __version__", []),
        ("app/library.py", "from gouache.face import load", ["face"]),
    ],
)
def test_the_check_of_floors_sees_every_way_to_import(own, line, expected):
    assert trespasses(PACKAGE / own, line) == expected


def shared_state(source: str) -> list[str]:
    """Module-level containers that some function changes, and `global` statements: state that everybody shares."""
    tree = ast.parse(source)
    containers: set[str] = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        containers |= {target.id for target in targets if isinstance(target, ast.Name)}
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        nodes = list(ast.walk(function))
        own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        for node in nodes:
            if isinstance(node, ast.Global):
                found.append(f"{node.lineno}: global {', '.join(node.names)}")
            owner = _changed(node)
            if isinstance(owner, ast.Name) and owner.id in containers - own:
                found.append(f"{owner.lineno}: {owner.id}")
    return found


def _changed(node: ast.AST) -> ast.AST | None:
    """What `node` changes in place: the owner of a changing method, of an item that is set or deleted."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        return node.func.value
    if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        return node.value
    return None


@pytest.mark.parametrize("path", FILES, ids=names_of)
def test_no_function_changes_what_its_module_shares(path):
    assert shared_state(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "guilty"),
    [
        ("CACHE = {}\ndef f(x):\n    CACHE[x] = 1", True),
        ("SEEN: list[int] = []\ndef f(x):\n    SEEN.append(x)", True),
        ("COUNT = 0\ndef f():\n    global COUNT\n    COUNT += 1", True),
        ("STATE = object()\ndef f():\n    STATE.value = 1", True),
        ("TABLE = {}\ndef f(x):\n    del TABLE[x]", True),
        ("TABLE = {}\ndef f(x):\n    return TABLE[x]", False),
        ("NAMES = []\ndef f():\n    NAMES = []\n    NAMES.append(1)", False),
        ("TABLE = {}\nTABLE[1] = 2", False),
    ],
)
def test_the_check_of_shared_state_sees_changes_and_leaves_reading_alone(source, guilty):
    assert bool(shared_state(source)) == guilty


@pytest.mark.parametrize("module", ["gouache", "gouache.cli.main", "gouache.files.open", "gouache.families.identify"])
def test_the_command_line_and_what_lists_a_file_start_without_torch(module):
    code = f"import {module}, sys; print(sorted({{'torch', 'numpy', 'PIL'}} & set(sys.modules)))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert found.stdout.strip() == "[]", found.stderr
