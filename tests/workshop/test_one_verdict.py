"""Every command decides on a hostile or damaged file as `convert` does, with the same message."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gouache
from gouache.app.settings import Settings
from gouache.errors import FileError, GouacheError
from gouache.workshop import vae
from gouache.workshop.convert import convert
from gouache.workshop.diff import open_both
from gouache.workshop.inspect import report
from gouache.workshop.lora.bake import bake
from gouache.workshop.lora.change import rename, resize
from gouache.workshop.lora.extract import extract
from gouache.workshop.lora.factors import Size
from gouache.workshop.merge import merge
from gouache.workshop.prune import prune
from gouache.workshop.recipe import Recipe, Source
from gouache.workshop.scan import scan
from tests.files.corpus import Case, write_corpus
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
Open = Callable[[Path], object]
# What `scan` calls the files that the other commands refuse with these errors.
VERDICTS = {
    "UnsafeFile": {"hostile", "suspicious"},
    "DamagedFile": {"damaged"},
    "NotAModel": {"not a model"},
    "FileError": {"unreadable"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


def refusal(open_it: Open, path: Path) -> tuple[str, str]:
    """(class, message) of the error that opening `path` raises; the class is "" if it raises none."""
    try:
        open_it(path)
    except (FileError, GouacheError) as error:
        return type(error).__name__, str(error)
    return "", ""


def differing(commands: dict[str, Open], paths: Iterable[Path], out: Path) -> dict[str, Any]:
    """{(command, file): (its refusal, that of `convert`)} where they are not the same."""
    wrong = dict[str, Any]()
    for path in paths:
        expected = refusal(lambda path: convert(path, out), path)
        assert expected[0] in VERDICTS, (path.name, expected)
        for name, command in commands.items():
            if (found := refusal(command, path)) != expected:
                wrong[f"{name} {path.name}"] = found, expected
    return wrong


def test_scan_and_inspect_decide_as_convert_does(corpus: tuple[Path, list[Case]], tmp_path: Path):
    folder, cases = corpus
    # One file for each message; a folder is not a file to scan.
    some = {(case.verdict, case.message): folder / case.name for case in cases if case.name != "special-folder.ckpt"}
    paths = list(some.values())
    wrong = dict[str, Any]()
    for path, scanned in zip(paths, scan(paths), strict=True):
        kind, message = refusal(lambda path: convert(path, tmp_path / "out.safetensors"), path)
        inspected = refusal(report, path)
        if inspected != (kind, message) or scanned.verdict not in VERDICTS[kind] or scanned.reason[:300] not in message:
            wrong[path.name] = kind, message, inspected, scanned

    assert wrong == {}


def test_every_other_command_decides_as_convert_does(
    corpus: tuple[Path, list[Case]], narrow: Narrows, loaded: Callable[[str], Any], settings: Settings, tmp_path: Path
):
    folder, cases = corpus
    # One file for each kind of file and error in the corpus.
    some = {(case.name.partition("-")[0], case.verdict): folder / case.name for case in cases}.values()
    some = [path for path in some if path.name != "special-absent.ckpt"]  # some commands look for a model of that name
    base, out, size = narrow("sd1").file, tmp_path / "out.safetensors", Size(2, 0)
    lora = tmp_path / "lora.safetensors"
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 64), f"{name}.lora_up.weight": torch.ones(64, 1)}, lora)
    model = loaded("sd1")

    def merged(*models: Path) -> None:
        merge(Recipe(models=tuple(Source(str(path)) for path in models)), out)

    commands: dict[str, Open] = {
        "prune": lambda path: prune(path, out),
        "merge, as the first": lambda path: merged(path, base),
        "merge, as the second": lambda path: merged(base, path),
        "diff": lambda path: open_both(base, path),
        "lora extract, tuned": lambda path: extract(path, base, out, size),
        "lora extract, base": lambda path: extract(base, path, out, size),
        "lora bake, model": lambda path: bake(path, [(lora, 1.0)], out),
        "lora bake, LoRA": lambda path: bake(base, [(path, 1.0)], out),
        "lora resize": lambda path: resize(path, out, size),
        "lora rename": lambda path: rename(path, out, "peft"),
        "vae bake, model": lambda path: vae.bake(path, base, out),
        "vae bake, VAE": lambda path: vae.bake(base, path, out),
        "paint --lora, --embedding, --hypernet": lambda path: model.attach(str(path)),
        "paint -m": lambda path: gouache.load(path, settings=settings),
        "paint --vae": lambda path: gouache.load(base, vae=path, settings=settings),
    }

    assert differing(commands, some, out) == {}
    assert not out.exists()
