"""`scan`: verdicts on the corpus of hostile files and on harmless files, and descriptions of the calls."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gouache.errors import PickleFinding
from gouache.workshop.effects import effect_of
from gouache.workshop.scan import Scanned, scan
from tests.files.corpus import DAMAGED, FILE, NOT_A_MODEL, UNSAFE, Case, write_corpus

VERDICTS = {
    UNSAFE: {"hostile", "suspicious"},
    DAMAGED: {"damaged"},
    NOT_A_MODEL: {"not a model"},
    FILE: {"unreadable"},
}


class Calls:
    """Pickles as the call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


# Files made to take long, whose errors and times `tests/files/test_hostile.py` measures.
BOMBS = ("bomb-", "st-many-", "st-much-")


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.full)])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Scanned]]:
    folder = tmp_path_factory.mktemp("corpus")
    cases = [case for case in write_corpus(folder) if request.param == "all" or not case.name.startswith(BOMBS)]
    found = {case.name: (case, next(scan([folder / case.name]))) for case in cases if not (folder / case.name).is_dir()}
    assert list(folder.glob("proof-*")) == [], "a payload was run"
    return found


def test_every_corpus_file_gets_the_expected_verdict(corpus: dict[str, tuple[Case, Scanned]]):
    wrong = {name: (c.verdict, s.verdict) for name, (c, s) in corpus.items() if s.verdict not in VERDICTS[c.verdict]}

    assert wrong == {}
    assert not any(found.verdict == "safe" for _, found in corpus.values())


def test_files_that_run_code_in_an_unsafe_loader_are_hostile_and_their_calls_are_listed(
    corpus: dict[str, tuple[Case, Scanned]],
):
    harmful = [found for case, found in corpus.values() if case.fires and case.name.startswith("call-")]

    assert len(harmful) > 20
    for found in harmful:
        assert found.verdict == "hostile" and found.intents, found
        assert all(intent.effect and "\n" not in intent.effect for intent in found.intents)


def test_a_call_is_reported_with_its_offset_arguments_and_effect(tmp_path: Path):
    (tmp_path / "b.ckpt").write_bytes(b"cposix\nsystem\n(S'touch proof'\ntR.")

    found = next(scan([tmp_path / "b.ckpt"]))

    assert found.verdict == "hostile"
    (intent,) = found.intents
    assert (intent.name, intent.byte, intent.arguments) == ("posix.system", 31, ("touch proof",))
    assert intent.effect == "runs a command in a shell"


def test_harmless_files_are_safe(tmp_path: Path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4).half()}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "b.ckpt")
    torch.save(tensors, tmp_path / "c.pt", _use_new_zipfile_serialization=False)

    assert [found.verdict for found in scan([tmp_path])] == ["safe"] * 3


def test_a_folder_is_also_searched_by_content(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "notes.txt").write_text("nothing to see")
    (tmp_path / "inner" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "inner" / "weights.dat").write_bytes(pickle.dumps(Calls(exec, "1")))
    (tmp_path / "web.ckpt").write_text("<!doctype html><html></html>")

    found = {Path(each.path).name: each.verdict for each in scan([tmp_path])}

    assert found == {"weights.dat": "hostile", "web.ckpt": "not a model"}


def test_functions_that_are_not_listed_have_an_effect_too():
    assert effect_of("os.system") != effect_of("os.chmod") != effect_of("somebody.function")
    assert "weights do not need" in effect_of("somebody.function")
    assert PickleFinding("a", 1).arguments == ()
