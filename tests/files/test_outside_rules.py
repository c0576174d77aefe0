"""Files and texts of others have one way in: the source of the reading folders is searched for any other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gouache

PACKAGE = Path(gouache.__file__).parent
FOLDERS = ("files", "layouts", "families", "adapters")
OTHER_WAYS = re.compile(
    r"\bjson\.loads?\b|\btomllib\.|\byaml\.|(?<![\w.])open\(|\bos\.open\(|\.read_(?:text|bytes)\(|\bre\.match\(rf?\"|"
    r"(?<!Image)\.open\((?![^)]*formats=)"
)
# What each of these reads was checked before, or is written by Gouache itself.
ALLOWED = {
    "files/metadata.py": 1,  # the header, after the strict reader accepted it
    "files/safetensors_file.py": 1,  # one string literal
    "files/write.py": 6,  # files and names that it creates
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_opened_and_texts_parsed_by_one_module(folder: str):
    found = {
        f"{folder}/{path.name}": len(OTHER_WAYS.findall(path.read_text(encoding="utf-8")))
        for path in (PACKAGE / folder).glob("*.py")
    }

    assert {name: count for name, count in found.items() if count} == {
        name: count for name, count in ALLOWED.items() if name.startswith(folder + "/")
    }
