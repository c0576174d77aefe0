"""The names of runs and their files, which come from words, folders and settings files of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from gouache.app.settings import Settings
from gouache.app.training import defaults, export, opening
from gouache.errors import GouacheError, RequestError
from gouache.training.run_settings import MODES, checked, template
from tests.app.training.short_runs import make_pictures

BASE = {"train": {"steps": 1, "batch": 1, "learning_rate": 1e-4}}
DOTS = (".", "..", "...", ".. ")


@pytest.mark.parametrize("stem", DOTS[:3])
@pytest.mark.parametrize("mode", MODES)
def test_no_run_is_in_a_folder_of_dots(
    mode: str, stem: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which would be the user's own: neither by the name of the result nor by that of the settings file."""
    monkeypatch.chdir(tmp_path)
    suffix = ".pt" if mode == "hypernetwork" else ".safetensors"
    chosen = checked({**BASE, "mode": mode, "output": f"{stem}{suffix}"})
    with pytest.raises(RequestError, match=r"output: .* names no folder for the run; expected a name such as zorb"):
        opening.new_folder(chosen, settings)
    Path(f"{stem}.toml").write_text(template(chosen))
    with pytest.raises(RequestError, match=r"run: .* names no folder for the run; expected a name such as zorb\.toml"):
        opening.opened(Path(f"{stem}.toml"), [])


@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize("mode", ["lora", "embedding", "hypernetwork"])
def test_chosen_names_are_names_of_files(
    mode: str, name: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of words, and of folders of pictures such as `..`."""
    folder = make_pictures(tmp_path / "pictures") / "inner" / "inner"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent if name == ".." else folder.parents[1])
    data = name if mode != "embedding" and name in (".", "..") else str(folder.parents[1])
    chosen = defaults.choose(
        mode, data, "mini", output=None, trigger=name, class_word="", steps=1, overrides=[], settings=settings
    )
    assert Path(chosen.output).stem in ("run", "pictures")
    assert opening.new_folder(chosen, settings).path.name in ("run", "pictures")


def test_a_result_that_cannot_be_written_is_refused_first(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for mode, suffix in (("hypernetwork", ".pt"), ("embedding", ".pt"), ("lora", ".safetensors")):
        with pytest.raises(GouacheError, match="cannot be written: its folder does not exist"):
            opening.new_folder(checked({**BASE, "mode": mode, "output": f"no/such/h{suffix}"}), settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mode", "output", "said"),
    [
        ("embedding", "zorbx.pt", "zorbx"),
        ("embedding", "zorb (v2).pt", r"zorb \(v2\)"),
        ("embedding", "Zorb.safetensors", ""),
        ("lora", "zorbx.safetensors", ""),
    ],
)
def test_the_word_of_an_embedding_of_another_name_is_said(mode: str, output: str, said: str):
    settings = checked({**BASE, "mode": mode, "data": {"trigger": "zorb"}})
    note = export.note_on_name(settings, Path("runs") / output)
    assert note.endswith(f"prompts say {said}") if said else not note
