"""One folder of pictures with captions serves every technique, as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

import gouache
from gouache.app.settings import Settings
from tests.app.training.test_runs import painted
from tests.pipelines import Narrow

OPTIONS = {"lora": "lora", "embedding": "embedding", "hypernetwork": "hypernet"}
FILES = {"hypernetwork": "zorb.pt"}


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_pictures_serve_every_technique(
    narrow: Callable[[str], Narrow], pictures: Path, settings: Settings, tmp_path: Path
):
    model, before = narrow("sd1").file, digest(pictures)
    plain = painted(model, settings)
    found = {}
    for mode in ("lora", "dreambooth", "embedding", "hypernetwork"):
        (tmp_path / mode).mkdir()
        finished = gouache.train(
            mode, pictures, model=model, output=tmp_path / mode / FILES.get(mode, "zorb.safetensors"),
            folder=tmp_path / mode / "run", trigger="zorb", class_word="cat" if mode == "dreambooth" else "", steps=2,
            settings=settings, learning_rate=1e-2, resolution=64, class_pictures=2 if mode == "dreambooth" else 0,
            samples={"every": 100, "steps": 1}, validation={"probe": 1, "timesteps": 1},
            **({"form": "none"} if mode == "dreambooth" else {}),
        )  # fmt: skip
        assert finished.path is not None and finished.path.exists()
        if mode == "dreambooth":
            found[mode] = painted(finished.path, settings)
        else:
            found[mode] = painted(model, settings, **{OPTIONS[mode]: [str(finished.path)]})
        if mode == "embedding":  # of which only prompts with the word know
            other = {"prompt": "a cat, red"}
            without = painted(model, settings, **other, embedding=[str(finished.path)])
            assert torch.equal(without, painted(model, settings, **other))
    assert digest(pictures) == before
    assert len({picture.numpy().tobytes() for picture in [plain, *found.values()]}) == 5
    assert all(torch.isfinite(picture).all() for picture in found.values())
