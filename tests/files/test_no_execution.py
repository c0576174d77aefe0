"""The package contains no function that runs code from a file: its source is searched for all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gouache

PACKAGE = Path(gouache.__file__).parent

FORBIDDEN = {
    "pickle's reader": r"\bpickle\.(load|loads|Unpickler)\b|\bimport (_?pickle|dill|joblib|shelve|marshal)\b",
    "torch's reader": r"\btorch\.(load|jit\.load|package)\b",
    "numpy's pickles": r"allow_pickle\s*=\s*True",
    "eval or exec of text": r"(?<![\w.`])(?<!def )(eval|exec|compile|__import__)\(",
    "import by a name in a variable": r"\bimport_module\b|\bfrom importlib import(?! (resources|metadata))",
    "look-up of a class by its path": r"\bresolve_name\b|\blocate\(",
    "yaml that makes objects": r"\byaml\.(load|unsafe_load|full_load)\b",
}

# An optimizer and a schedule are named by the user's own training settings, never by a model file.
# A YAML document is read with a SafeLoader, which makes plain values only.
ALLOWED = {
    ("import by a name in a variable", "training/optimizers.py"),
    ("import by a name in a variable", "training/rates.py"),
    ("yaml that makes objects", "outside.py"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_source_file_contains_a_forbidden_call(what: str):
    found = [
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for match in [re.search(FORBIDDEN[what], path.read_text(encoding="utf-8"))]
        if match and (what, path.relative_to(PACKAGE).as_posix()) not in ALLOWED
    ]

    assert found == []


def test_the_search_finds_every_forbidden_call():
    samples = {
        "pickle's reader": "value = pickle.load(stream)",
        "torch's reader": "torch.load(path, weights_only=True)",
        "numpy's pickles": "numpy.load(path, allow_pickle=True)",
        "eval or exec of text": "eval(text)",
        "import by a name in a variable": "importlib.import_module(name)",
        "look-up of a class by its path": "pkgutil.resolve_name(name)",
        "yaml that makes objects": "yaml.load(stream)",
    }

    assert all(re.search(FORBIDDEN[what], sample) for what, sample in samples.items())
    assert not re.search(FORBIDDEN["eval or exec of text"], "module.eval()\nre.compile(text)\nself.exec(x)")


def test_the_files_folder_does_not_use_importlib():
    assert [path.name for path in (PACKAGE / "files").glob("*.py") if "importlib" in path.read_text()] == []
