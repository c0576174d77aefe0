"""The architecture, checked from the imports in the code: which folder may import which, and what none may import."""

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

# Folders and modules directly in the package, in layers from the lowest to the highest. A file imports from its own
# folder and from lower layers, never from another folder of its layer. `face` is the public API, which the command line
# uses too; `__init__` exports it lazily.
LAYERS = (
    ("errors", "version", "wording"),
    ("outside",),
    ("nn", "diffusion"),
    ("files", "layouts", "images", "prompts"),
    ("families", "data"),
    ("adapters", "captions"),
    ("model", "workshop"),
    ("generate", "training"),
    ("app",),
    ("face",),
    ("server",),
    ("cli",),
    ("__init__", "__main__"),
)
LAYER_OF = {folder: layer for layer, folders in enumerate(LAYERS) for folder in folders}

# Libraries that only the tests and recipes use, and torchvision, for which pip finds no CPU build by itself.
FORBIDDEN = {"torchvision", "transformers", "diffusers", "accelerate", "hypothesis", "pytest", "emoji"}

MUTATING_METHODS = {
    "append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault", "popitem", "add", "discard",
    "sort", "reverse", "appendleft", "popleft",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")


def folder_of(path: Path) -> str:
    """The folder of the package that contains `path`; for a module directly in the package, the module's name."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path, tree: ast.AST) -> Iterator[str]:
    """The full name of every module that the code imports, in functions and under `TYPE_CHECKING` too."""
    package = ["gouache", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "gouache":  # `from gouache import nn` imports a folder
                yield from (f"gouache.{alias.name}" for alias in node.names)
            else:
                yield origin


def folders_imported(path: Path, source: str) -> set[str]:
    names = [name.split(".") for name in imported(path, ast.parse(source)) if name.split(".")[0] == "gouache"]
    folders = {(name[1:] or ["__init__"])[0] for name in names}
    # `from gouache import load` imports a name of the public API
    return {folder if folder in LAYER_OF else "__init__" for folder in folders}


def violations(path: Path, source: str) -> list[str]:
    """The folders that a file at `path` with the code `source` imports and may not."""
    own = folder_of(path)
    imports = folders_imported(path, source) - {own}
    return sorted(folder for folder in imports if LAYER_OF[folder] >= LAYER_OF[own])


def path_id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_folder_has_a_layer():
    assert {folder_of(path) for path in FILES} <= LAYER_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_a_file_imports_only_lower_layers_and_its_own_folder(path):
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_no_file_imports_a_library_of_the_tests(path):
    names = imported(path, ast.parse(path.read_text(encoding="utf-8")))

    assert not {name.split(".")[0] for name in names} & FORBIDDEN


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
def test_the_layer_check_finds_every_form_of_import(own, line, expected):
    assert violations(PACKAGE / own, line) == expected


def shared_state(source: str) -> list[str]:
    """Module-level containers that a function changes, and `global` statements: mutable state shared by all callers."""
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
            owner = _mutated(node)
            if isinstance(owner, ast.Name) and owner.id in containers - own:
                found.append(f"{owner.lineno}: {owner.id}")
    return found


def _mutated(node: ast.AST) -> ast.AST | None:
    """The object that `node` changes in place: by a mutating method, or by setting or deleting an item or attribute."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
        return node.func.value
    if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        return node.value
    return None


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_no_function_changes_a_global_of_its_module(path):
    assert shared_state(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
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
def test_the_shared_state_check_finds_changes_and_ignores_reading(source, expected):
    assert bool(shared_state(source)) == expected


@pytest.mark.parametrize("module", ["gouache", "gouache.cli.main", "gouache.files.open", "gouache.families.identify"])
def test_importing_the_command_line_or_the_file_readers_does_not_import_torch(module):
    code = f"import {module}, sys; print(sorted({{'torch', 'numpy', 'PIL'}} & set(sys.modules)))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert found.stdout.strip() == "[]", found.stderr
