"""The library's code opens and parses what comes from outside in one way only, `gouache.outside`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gouache import app, cli

APP, CLI = Path(app.__file__).parent, Path(cli.__file__).parent
FILES = [*APP.rglob("*.py"), *(CLI / f"{name}.py" for name in ("models", "models_page", "compare", "doctor"))]
READS = {"read_text", "read_bytes", "loads", "load", "safe_load", "open", "fdopen"}
# Files that the code writes itself, and calls that open something else.
WRITES = {
    ("download.py", "part.open"), ("download.py", "_OPENER.open"), ("install.py", "place.open"),
    ("indexing.py", "os.open"), ("indexing.py", "os.fdopen"), ("tables.py", "os.open"),
    ("loading.py", "loading.load"), ("doctor.py", "load.load"), ("repaint.py", "load.load"),
    ("compare.py", "clip.load"), ("prepare.py", "loading.load"), ("estimate.py", "loading.load"),
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_is_read_in_another_way(path: Path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = {ast.unparse(each) for each in calls if isinstance(each, ast.Attribute) and each.attr in READS}
    found |= {each.id for each in calls if isinstance(each, ast.Name) and each.id == "open"}

    assert {call for call in found if (path.name, call) not in WRITES} == set()
