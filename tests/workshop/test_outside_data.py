"""Files and texts of others: pipes, endless devices, deep or huge JSON and TOML, escape sequences in all of them."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gouache
from gouache.errors import DamagedFile, FileError, GouacheError, RequestError
from gouache.workshop import layout, recipe
from gouache.workshop.block_weights import weights
from gouache.workshop.details import finite, tag_counts, text_of, trigger_words
from gouache.workshop.inspect import files_of, report
from gouache.workshop.merge import merge
from gouache.workshop.recipe import Recipe, Source
from gouache.workshop.scan import scan
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
ESCAPE = "\x1b[31mX\u202e\x9b"
DEEP, DIGITS = "[" * 100_000, "9" * 5000

# ---- the code itself


SOURCES = Path(gouache.__file__).parent
OURS = sorted(
    [
        *(SOURCES / "workshop").rglob("*.py"),
        *(SOURCES / "training").rglob("*.py"),
        *(
            SOURCES / "cli" / f"{name}.py"
            for name in (
                "convert",
                "embedding",
                "files",
                "inspect",
                "lora",
                "merge",
                "pairs",
                "prune",
                "scan",
                "strengths",
                "text",
                "vae",
            )
        ),
    ]
)
PARSERS = {"json.loads", "json.load", "tomllib.loads", "tomllib.load", "yaml.load", "yaml.safe_load", "pickle.load",
           "pickle.loads", "torch.load"}  # fmt: skip
READERS = {"read_text", "read_bytes", "open"}


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_outside_files_are_opened_and_parsed_in_one_place(path: Path):
    """`gouache.outside` opens and parses; here nothing else does, except for writing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = []
    imported = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                and node.module == "gouache.outside" for alias in node.names}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"tomllib", "yaml", "pickle"}:
            wrong.append(f"line {node.lineno}: imports a parser")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        writes = called == "os.open" or any(isinstance(mode, str) and set(mode) & set("awx") for mode in modes)
        if called in PARSERS or (name in READERS and called not in imported and not writes):
            wrong.append(f"line {node.lineno}: {called}")
    assert not wrong, f"{path}: {wrong}"


# ---- folders of the trainer


STATE = '{"settings": {"steps": 5, "learning_rate": 0.5}, "step": 1}'
MANIFEST = '{"files": {"a.safetensors": {"bytes": 5}}}'


def trainer(folder: Path, state: str = STATE, manifest: str = MANIFEST) -> Path:
    folder.mkdir()
    for name, content in (("state.json", state), ("manifest.json", manifest)):
        if content == "pipe":
            os.mkfifo(folder / name)
        elif content == "endless":
            (folder / name).symlink_to("/dev/zero")
        else:
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_a_folder_of_the_trainer_is_reported(tmp_path: Path):
    found = report(trainer(tmp_path / "step-1"))

    assert found.size == 5 and found.details[0].value == "step 1 of 5"


@posix
@pytest.mark.parametrize(
    "content",
    [
        "pipe", "endless", DEEP, "[]", "5", "", "nul", "\0", '{"step": Infinity, "settings": {}}',
        '{"files": {"a": {"bytes": 1e999}}}', '{"files": {"a": {"bytes": ' + "9" * 400 + "}}}",
        '{"files": {"a": {"bytes": ' + DIGITS + "}}}", '{"files": {"a": {"bytes": -1}}}', '{"files": {"a": 5}}',
        '{"files": []}', '{"step": true, "settings": {}}', '{"step": 1, "settings": 5}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["state", "manifest"])
def test_other_content_is_no_folder_of_the_trainer(tmp_path: Path, name: str, content: str):
    folder = trainer(tmp_path / "folder", **{name: content})

    assert list(files_of(folder)) == [folder]
    with pytest.raises(FileError, match="is a folder without a model"):
        report(folder)


def test_escapes_in_a_folder_of_the_trainer_are_not_printed(tmp_path: Path):
    settings = {"steps": ESCAPE, "learning_rate": ESCAPE}
    files = {ESCAPE: {"bytes": 5}, "optimizer.safetensors": {"bytes": 6}}
    state, manifest = json.dumps({"settings": settings, "step": 1, "best": ESCAPE}), json.dumps({"files": files})

    found = report(trainer(tmp_path / "folder", state, manifest))

    assert all(text.isprintable() for detail in found.details for text in (detail.name, detail.value, detail.evidence))


# ---- recipes and block weights


@pytest.mark.parametrize("text", [
    "a = " + DEEP, "seed = " + DIGITS, "seed = " + "9" * 4000, "rank = " + "9" * 40, "= 5", "\0", "blocks = 5",
    "[blocks]\nalpha = 5", "[blocks]\nx = 'IN'", "[rules]\nalpha = 'x=1'", "models = [5]", "[[models]]\npath = 5",
    "[[models]]\npath = '" + "a" * 5000 + "'", '[[models]]\npath = "\\u0000"', "alpha = '1'", "seed = 1.5",
    "seed = true",     '"\\u001b[31m" = 5', 'method = 5', 'alpha = [1]', 'alpha = 2020-01-01',
])  # fmt: skip
def test_a_bad_recipe_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "r.toml").write_text(text)

    with pytest.raises(GouacheError) as caught:
        merge(recipe.read(tmp_path / "r.toml"), tmp_path / "out.safetensors")

    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@posix
def test_a_recipe_is_a_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    (tmp_path / "latin1.toml").write_bytes(b"method = 'caf\xe9'")
    for name in ("pipe.toml", "endless.toml", "absent.toml", "latin1.toml", "."):
        with pytest.raises(FileError):
            recipe.read(tmp_path / name)


@pytest.mark.parametrize(("name", "value"), [
    ("alpha", float("nan")), ("alpha", 1e30), ("beta", float("inf")), ("alpha", int("9" * 4000)), ("density", 0.0),
    ("density", float("nan")), ("density", 1.5), ("epsilon", -1.0), ("epsilon", float("nan")), ("rank", 0),
])  # fmt: skip
def test_numbers_that_no_merge_can_use_are_refused_by_name(narrow: Narrows, tmp_path: Path, name: str, value: float):
    given: dict[str, Any] = {name: value, "models": (Source(str(narrow("sd1").file)),) * 2}

    with pytest.raises(RequestError, match=f"^{name}: "):
        merge(Recipe(**given), tmp_path / "out.safetensors")


@posix
def test_bad_block_weights_are_one_line_and_quote_no_file(tmp_path: Path, narrow: Narrows):
    spec = layout.opened(narrow("sd1").file)[1].components["unet"].spec
    secret = tmp_path / "secret"
    secret.write_text("password, 12345\n")
    deep, number = tmp_path / "deep", tmp_path / "number"
    deep.write_text("a = " + DEEP)
    number.write_text("IN00 = " + DIGITS)
    os.mkfifo(tmp_path / "pipe")
    files = map(str, (secret, deep, number, tmp_path / "pipe", "/dev/zero", tmp_path))
    for text in ("x" * 5000, "nan," * 25, "1e9" + ",0" * 24, ESCAPE, "a\0b", *files):
        with pytest.raises(GouacheError) as caught:
            weights(0.5, text, spec)  # type: ignore[arg-type]
        assert str(caught.value).isprintable() and "password" not in str(caught.value) and len(str(caught.value)) < 500
    for rule in ("x=nan", "x=1e99", f"{ESCAPE}", "=1"):
        with pytest.raises(RequestError) as refused:
            weights(0.5, None, None, [rule])
        assert str(refused.value).isprintable()


# ---- metadata and values that files store


@pytest.mark.parametrize("text", [
    DEEP, '{"a": {"x": ' + DIGITS + "}}", "5", "[]", '{"a": 5}', '{"a": {"x": -1, "y": true, "z": 1.5, "w": 1e999}}',
    '{"a": {"x": ' + "9" * 399 + "}}", "\0",
])  # fmt: skip
def test_tags_that_are_no_counts_are_left_out(text: str):
    metadata = {"ss_tag_frequency": text}

    assert not tag_counts(metadata) and not trigger_words(metadata)


def test_large_numbers_and_odd_values_are_text():
    numbers = (10**400, -(10**400), 10**5000, 1e308, float("nan"), float("inf"), [10**5000], list(range(10_000)))
    for value in (*numbers, [[[]]], ESCAPE, [ESCAPE], {"a": 1}, b"x"):
        assert text_of(value).isprintable() and len(text_of(value)) < 250
    assert text_of([1, 2.0, 1]) == "[1, 2.0, 1]" and text_of(5) == "5" and text_of(None) == "None"
    assert finite(10**400) is finite(float("inf")) is finite("1") is finite(True) is None and finite(2) == 2.0


def checkpoint(path: Path, **extra: Any) -> Path:
    torch.save({"state_dict": {"a": torch.zeros(2)}, **extra}, path)
    return path


@pytest.mark.parametrize("extra", [
    {"optimizer": {"param_groups": 5}}, {"optimizer": {"param_groups": True}}, {"optimizer": [{"param_groups": None}]},
    {"optimizer": {"param_groups": [{"lr": 10**70, "weight_decay": -(10**70)}], "state": 5}}, {"epoch": 10**70},
    {"optimizer": {"param_groups": [{"lr": ESCAPE}], "state": {0: {ESCAPE: torch.zeros(3)}}}},
    {"callbacks": {"x": {"best_score": 10**70, f"score{ESCAPE}": 0.5, "nan_score": float("nan")}}}, {"callbacks": [1]},
    {"lr_schedulers": 5}, {"optimizer_states": [5, None, {"state": {0: 5}}]},
])  # fmt: skip
def test_training_states_of_any_form_are_reported(tmp_path: Path, extra: dict[str, Any]):
    found = report(checkpoint(tmp_path / "a.pt", **extra))

    assert all(text.isprintable() for each in found.details for text in (each.name, each.value, each.evidence))


def test_escapes_in_embeddings_and_hypernetworks_are_not_printed(tmp_path: Path):
    torch.save(
        {"string_to_param": {"*": torch.zeros(2, 768)}, "name": ESCAPE, "step": 5, "sd_checkpoint_name": ESCAPE},
        tmp_path / "e.pt",
    )
    layers = {f"linear.{n}.{leaf}": torch.zeros(*shape) for n, a, b in ((0, 1536, 768), (1, 768, 1536))
              for leaf, shape in (("weight", (a, b)), ("bias", (a,)))}  # fmt: skip
    torch.save(
        {768: [dict(layers), dict(layers)], "layer_structure": ESCAPE, "name": ESCAPE, "activation_func": ESCAPE},
        tmp_path / "h.pt",
    )
    for name, kind in (("e.pt", "embedding"), ("h.pt", "hypernetwork")):
        found = report(tmp_path / name)
        assert found.facts[0].value == kind
        assert all(text.isprintable() for each in found.details for text in (each.name, each.value, each.evidence))


@pytest.mark.parametrize("text", [DEEP, DIGITS, "[]", "5", '{"unet": 5}', '{"unet": ["a"]}', '{"unet": [1, 2]}'])
def test_damaged_places_in_the_leftovers_of_a_folder_are_one_line(narrow: Narrows, tmp_path: Path, text: str):
    import shutil

    shutil.copytree(narrow("sd1").folder, tmp_path / "folder")
    save_file({"betas": torch.zeros(3)}, tmp_path / "folder" / "leftovers.safetensors", {"gouache.places": text})

    with pytest.raises(DamagedFile, match=r"its metadata gouache\.places "):
        layout.opened(tmp_path / "folder")


@pytest.mark.parametrize("text", [DEEP, "[]", DIGITS])
def test_ancestors_that_cannot_be_read_do_not_stop_a_merge(narrow: Narrows, tmp_path: Path, text: str):
    from safetensors.torch import load_file

    save_file(
        load_file(narrow("sd1").file), tmp_path / "a.safetensors", {"sd_merge_models": text, "sd_merge_recipe": text}
    )

    merge(Recipe(models=(Source(str(tmp_path / "a.safetensors")),) * 2), tmp_path / "out.safetensors")


# ---- bounded time


def write_header(path: Path, names: list[str]) -> Path:
    entries = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * number, 4 * number + 4]}
        for number, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * len(names)))
    return path


def test_many_unknown_names_take_little_time(tmp_path: Path):
    path = write_header(tmp_path / "a.safetensors", [f"{number:06d}{'a' * 20}" for number in range(60_000)])

    began = time.process_time()
    found = report(path)

    assert len(found.unknown) == 60_000 and time.process_time() - began < 6


def test_long_names_take_little_time(tmp_path: Path):
    names = [f"lora_unet_{n}{'ab' * 1000}.{part}.weight" for n in range(200) for part in ("lora_down", "lora_up")]
    names += [f"zora_unet_{n}{'ba' * 1000}.lora_xown.weight" for n in range(20)]

    began = time.process_time()
    report(write_header(tmp_path / "a.safetensors", names))

    assert time.process_time() - began < 3


def test_the_most_similar_name_is_found_among_many(tmp_path: Path):
    """Of 5,000 names, the one with a wrong letter in its middle, and the one with a wrong beginning."""
    known = [f"lora_unet_block_{n}_attn.{part}.weight" for n in range(2500) for part in ("lora_down", "lora_up")]
    wrong = {
        "lora_unet_block_1234_attn.lora_dovvn.weight": "lora_unet_block_1234_attn.lora_down.weight",
        "zora_unet_block_777_attn.lora_ups.weight": "lora_unet_block_777_attn.lora_up.weight",
    }

    found = report(write_header(tmp_path / "a.safetensors", [*known, *wrong]))

    assert (
        found.unknown["lora_unet_block_1234_attn.lora_dovvn.weight"]
        == wrong["lora_unet_block_1234_attn.lora_dovvn.weight"]
    )


# ---- folders and scans


@posix
def test_deep_folders_and_links_in_loops_are_scanned(tmp_path: Path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.safetensors").symlink_to(tmp_path / "self.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "endless.ckpt").symlink_to("/dev/zero")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("hidden.ckpt", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)

    try:
        found = {Path(each.path).name: each.verdict for each in scan([tmp_path])}
    finally:
        _remove(tmp_path)

    assert found.pop("hidden.ckpt", "not a model") == "not a model"
    assert found == {
        "a.safetensors": "safe", "self.safetensors": "unreadable", "pipe.safetensors": "not a model",
        "endless.ckpt": "not a model",
    }  # fmt: skip


def _remove(folder: Path) -> None:
    """Remove the nested folders from the inside; shutil and pytest call themselves for each level."""
    paths = []
    here = folder / "d"
    while here.is_dir():
        paths.append(here)
        here = here / "d"
    for path in reversed(paths):
        for file in path.iterdir():
            if not file.is_dir():
                file.unlink()
        path.rmdir()


@pytest.mark.parametrize("function", [lambda path: list(scan([path])), lambda path: list(files_of(path))])
def test_a_folder_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[[Path], list[Any]]
):
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    monkeypatch.setattr(Path, "iterdir", refused)
    monkeypatch.setattr(Path, "exists", refused)
    try:
        (found,) = function(tmp_path)
        text = f"{found.verdict}: {found.reason}"
    except FileError as error:
        text = str(error)

    assert "Permission denied" in text and ("unreadable" in text or "cannot be read" in text)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_without_tensors_is_no_model(tmp_path: Path, as_zip: bool):
    path, content = tmp_path / "a.pt", pickle.dumps(5, 2)
    if as_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(content)

    (found,) = scan([path])
    assert (found.verdict, found.reason) == (
        "not a model",
        "holds no tensors, so it is not a model (its pickle holds int)",
    )
    with pytest.raises(FileError, match="holds no tensors"):
        report(path)


def test_an_optimizer_without_weights_is_reported(tmp_path: Path):
    state = {"state": {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"optimizer": state}, tmp_path / "a.pt")

    (scanned,) = scan([tmp_path / "a.pt"])

    assert scanned.verdict == "safe"
    assert report(tmp_path / "a.pt").format == "torch zip"


# ---- what else a report says


def test_averages_are_one_line_of_a_report_and_of_a_conversion(narrow: Narrows, tmp_path: Path):
    from gouache.workshop.convert import convert

    def average(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1

    file = altered(narrow("sd1").file, tmp_path / "a.safetensors", average)

    found, done = report(file), convert(file, tmp_path / "folder")

    assert list(found.leftovers) == ["EMA weights"] and len(found.leftovers["EMA weights"]) > 300
    assert dict(done.leftovers) == {"EMA weights": len(found.leftovers["EMA weights"])}
