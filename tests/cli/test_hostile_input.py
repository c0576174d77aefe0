"""Every command, with hostile files and texts in every place where a file or text can stand.

Each ends within seconds with 0, 1 or 2, in one line if it is an error, and prints nothing that a terminal acts on. The
commands and their parameters are those of the command line itself, so that a new one fails here until it is in `VALID`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gouache.app import loading
from gouache.cli.main import app
from gouache.cli.progress import Bar
from gouache.errors import RequestError
from gouache.training.run_settings import checked, template
from tests.app.model_files import embedding, lora
from tests.cli.conftest import Command, Ended
from tests.pipelines import Narrow

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes and devices of POSIX")

SECONDS = 10  # for a command that takes far less than one, on a busy machine
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u200b\u2028"
DEEP, DIGITS = 100_000, "9" * 5000

# Values of the parameters with which each command works; a list is several of one parameter. The other parameters are
# tried as well, beside these.
VALID: dict[str, dict[str, Any]] = {
    "paint": {"prompt": "cat", "model": "{model}", "output": "p.png", "steps": 1, "size": "64x64", "overwrite": True},
    "repaint": {"picture": "{picture}"},
    "inspect": {"files": "{lora}"},
    "scan": {"paths": "{lora}"},
    "convert": {"source": "{lora}", "target": "out.safetensors", "overwrite": True},
    "prune": {"source": "{model}", "target": "out.safetensors", "overwrite": True},
    "merge": {"models": ["{model}", "{model}", "out.safetensors"], "overwrite": True},
    "metadata": {"file": "{lora}"},
    "diff": {"a": "{lora}", "b": "{lora}"},
    "compare": {"models": ["{model}", "{model}"], "prompts": "{prompts}", "steps": 1, "size": "64x64"},
    "samplers": {},
    "doctor": {},
    "hash": {"files": "{lora}"},
    **{
        f"train {mode}": {
            "data": "{pictures}",
            "model": "{model}",
            "output": "out.safetensors",
            "trigger": "zorb",
            "overwrite": True,
        }
        for mode in ("lora", "dreambooth", "finetune", "embedding")
    },
    "train hypernetwork": {"data": "{pictures}", "model": "{model}", "output": "out.pt", "overwrite": True},
    "train slider": {"positive": "red", "model": "{model}", "output": "out.safetensors", "overwrite": True},
    "train pretrain": {
        "part": "vae",
        "data": "{pictures}",
        "model": "{model}",
        "output": "out.safetensors",
        "overwrite": True,
    },
    "train new": {"mode": "lora", "data": "{pictures}", "output": "new.toml", "model": "{model}", "overwrite": True},
    "train run": {"settings_file": "{run}"},
    "train status": {"run": "{run}"},
    "train report": {"run": "{run}", "output": "report.html"},
    "train compare": {"runs": ["{run}", "{run}"], "output": "report.html"},
    "train export": {"run": "{run}", "output": "out.safetensors", "overwrite": True},
    "dataset check": {"data": "{pictures}"},
    "dataset show": {"data": "{pictures}", "output": "sheet.png", "overwrite": True},
    "vae bake": {"model": "{model}", "vae": "{model}", "target": "out.safetensors", "overwrite": True},
    "vae extract": {"model": "{model}", "target": "out.safetensors", "overwrite": True},
    "lora extract": {"tuned": "{model}", "base": "{model}", "target": "out.safetensors", "overwrite": True},
    "lora bake": {"model": "{model}", "loras": ["{lora}", "out.safetensors"], "overwrite": True},
    "lora resize": {"source": "{lora}", "target": "out.safetensors", "rank": 1, "overwrite": True},
    "lora merge": {"loras": ["{lora}", "{lora}", "out.safetensors"], "overwrite": True},
    "lora rename": {"source": "{lora}", "target": "out.safetensors", "to": "kohya", "overwrite": True},
    "embedding merge": {"embeddings": ["{embedding}", "{embedding}", "out.safetensors"], "overwrite": True},
    "models list": {},
    "models add": {"paths": "{lora}"},
    "models remove": {"name": "style", "delete": True},
    "models show": {"name": "style"},
    "models set": {"name": "style", "tag": "hat"},
    "models find": {"words": "style"},
    "models verify": {},
    "models install": {"source": "{lora}"},
}


def _leaves(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for word, each in getattr(command, "commands", {}).items():
        full = f"{name} {word}".strip()
        yield from _leaves(each, full) if hasattr(each, "commands") else [(full, each)]


COMMAND = typer.main.get_command(app)
COMMANDS = dict(_leaves(COMMAND))
LOADED = functools.cache(loading.load)


def test_every_command_is_tried():
    assert COMMANDS.keys() == VALID.keys()


@pytest.fixture
def world(narrow: Callable[[str], Narrow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Good files, and a library that contains the LoRA `style`."""
    for name, folder in (("DATA", "data"), ("MODELS", "models"), ("OUTPUT", "pictures"), ("CONFIG", "config.toml")):
        monkeypatch.setenv(f"GOUACHE_{name}", str(tmp_path / folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("gouache.cli.main.app", COMMAND)  # what `app` builds anew at each call, which takes 0.1 s
    monkeypatch.setattr("gouache.app.loading.load", LOADED)
    (tmp_path / "prompts.txt").write_text("cat\n")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    style, word = lora(tmp_path / "models/Lora/style.safetensors", 1.0), embedding(tmp_path / "word.safetensors")
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    for folder in (pictures, run):
        folder.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    settings = {"data": {"folder": str(pictures)}, "model": {"name": str(narrow("sd1").file)},
                "train": {"steps": 1, "batch": 1, "learning_rate": 1e-3}}  # fmt: skip
    (run / "settings.toml").write_text(template(checked(settings)))
    monkeypatch.setattr("gouache.app.training.prepare.load_model", no_training)
    return {"model": narrow("sd1").file, "lora": style, "embedding": word, "prompts": tmp_path / "prompts.txt",
            "picture": picture, "pictures": pictures, "run": run}  # fmt: skip


def no_training(*_: object) -> None:
    """In place of loading a model for training: all that is read before it has been accepted then."""
    raise RequestError("model", "is not loaded by these tests")


@pytest.fixture
def hostile(tmp_path: Path, world: dict[str, Path]) -> dict[str, str]:
    """Hostile values of a parameter: paths, and texts."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    values = {kind: folder / kind for kind in ("pipe", "device", "loop", "deep")}
    for kind, path in values.items():
        place(kind, path)
    escapes = folder / f"{ESCAPES}.safetensors"
    escapes.write_bytes(world["lora"].read_bytes())
    texts = {"long number": DIGITS, "escapes": ESCAPES, "not UTF-8": "a\udcff"}
    return {**{kind: str(path) for kind, path in values.items()}, "named with escapes": str(escapes), **texts}


def place(kind: str, path: Path, form: str = "json") -> None:
    """Put a hostile file of `kind` at `path`; `form` is that of its content, if it has any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(CONTENTS[kind][form])


_QUOTED = json.dumps(ESCAPES)
CONTENTS = {
    "deep": {"json": "[" * DEEP, "toml": f"a = {'[' * DEEP}", "yaml": "[" * DEEP},
    "deep keys": {"json": '{"a":' * DEEP, "toml": f"{'.'.join('a' * DEEP)} = 1", "yaml": "{a: " * DEEP},
    "digits": {"json": f'{{"a": {DIGITS}}}', "toml": f"a = {DIGITS}", "yaml": f"a: {DIGITS}"},
    "escapes": {
        "json": f"{{{_QUOTED}: {_QUOTED}}}",
        "toml": f"{_QUOTED.replace('x07', 'u0007')} = 1",
        "yaml": f"{_QUOTED}: {_QUOTED}",
    },
}
KINDS = ("pipe", "device", "loop", "folder", *CONTENTS)


class Late(BaseException):
    """Not an Exception, which commands may catch."""


def fault(ended: Ended) -> str:
    """What is wrong about how a command ended; "" if nothing is."""
    printed = ended.out + ended.err
    if ended.code not in (0, 1, 2):
        return f"exit code {ended.code}"
    if acting := {each for each in printed if each not in "\n\t" and unicodedata.category(each) in ("Cc", "Cf", "Zl")}:
        return f"printed {acting}"
    lines = [line for line in ended.err.splitlines() if not line.startswith("note: ")]
    if ended.code == 2 and not lines and ended.out:  # `scan` reports on stdout what it could not read
        return ""
    if ended.code == 2 and not (len(lines) == 1 and lines[0].startswith("error: ")):
        return f"not one line: {lines}"
    return ""


def tried(gouache: Command, arguments: list[str]) -> str:
    """Run a command that must end soon; what is wrong about how it ended."""

    def late(number: int, frame: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return fault(gouache(*arguments))
    except Late:
        return f"not done in {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command_line(name: str, values: dict[str, Any]) -> list[str]:
    """The arguments of a command for the values of its parameters."""
    options, positions = list[str](), list[str]()
    for parameter in COMMANDS[name].params:
        value = values.get(parameter.name)
        if value is None:
            continue
        each = [str(one) for one in (value if isinstance(value, list) else [value])]
        if parameter.param_type_name == "argument":
            positions += each
        else:
            option = max(parameter.opts, key=len)
            options += [option] if value is True else [part for one in each for part in (option, one)]
    return [*name.split(), *options, "--", *positions]


@pytest.mark.parametrize("name", VALID)
def test_a_hostile_value_of_a_parameter_is_one_line(
    name: str, gouache: Command, world: dict[str, Path], hostile: dict[str, str]
):
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(each) for each in value]
        return value.format(**world) if isinstance(value, str) else value

    valid = {key: filled(value) for key, value in VALID[name].items()}
    wrong = dict[str, str]()
    for parameter in COMMANDS[name].params:
        if getattr(parameter, "is_flag", False):
            continue
        for kind, value in hostile.items():
            values = dict(valid)
            first = values.get(parameter.name)
            values[parameter.name] = [value, *first[1:]] if isinstance(first, list) else value
            if found := tried(gouache, command_line(name, values)):
                wrong[f"{parameter.name}: {kind}"] = found
    assert not wrong


LORA, OUT = "models/Lora/style.safetensors", "out.safetensors --overwrite"
PEFT = "peft/adapter_model.safetensors"

# Files that commands find by themselves: where, the form of their content, and a command that reads them.
PLACES = {
    "settings": ("config.toml", "toml", "models list"),
    "added folders": ("data/folders.json", "json", "models list"),
    "library": ("data/library.sqlite", "json", "models list"),
    "hash cache": ("cache/gouache/hashes.json", "json", f"hash {LORA}"),
    "Hugging Face's cache": ("cache/huggingface/hub/models--a--b/refs/main", "json", "models list"),
    "a model in a folder": ("models/Lora/other.safetensors", "json", "models list"),
    "sidecar .json": ("models/Lora/style.json", "json", "models show style"),
    "sidecar .civitai.info": ("models/Lora/style.civitai.info", "json", "models show style"),
    "sidecar .txt": ("models/Lora/style.txt", "json", "models show style"),
    "preview": ("models/Lora/style.preview.png", "json", "models show style"),
    "model paths": ("paths/extra_model_paths.yaml", "yaml", "models add paths/extra_model_paths.yaml"),
    "settings of a run": ("run/settings.toml", "toml", "train run run"),
    "log of a run": ("run/log.jsonl", "json", "train status run"),
    "times of a run": ("run/times.jsonl", "json", "train report run"),
    "caption": ("pictures/a.txt", "json", "dataset check pictures"),
    "picture of a data set": ("pictures/a.png", "json", "dataset check pictures"),
    "metadata of a data set": ("pictures/metadata.jsonl", "json", "dataset check pictures"),
    "kohya's TOML": ("data.toml", "toml", "dataset check data.toml"),
    "merge recipe": ("recipe.toml", "toml", "merge recipe.toml out.safetensors"),
    "prompts": ("prompts.txt", "json", "compare style style --prompts prompts.txt"),
    "adapter_config.json": ("peft/adapter_config.json", "json", f"inspect {PEFT}"),
    "adapter_config.json in use": ("peft/adapter_config.json", "json", f"lora rename {PEFT} {OUT} --to kohya"),
    "model_index.json": ("folder/model_index.json", "json", "inspect folder"),
    "model_index.json in use": ("folder/model_index.json", "json", "models install folder"),
    "index of parts": ("folder/unet/model.safetensors.index.json", "json", "inspect folder/unet"),
    "index of parts in use": ("folder/unet/model.safetensors.index.json", "json", f"convert folder/unet {OUT}"),
    "state of a training": ("training/state.json", "json", "inspect training"),
    "manifest of a training": ("training/manifest.json", "json", "inspect training"),
    "picture": ("picture.png", "json", "repaint picture.png"),
    "thumbnail": ("thumb.png", "json", f"metadata {LORA} --thumbnail thumb.png -o {OUT}"),
    "token": ("token", "json", "models install org/name"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_hostile_file_in_its_place_is_one_line_or_passed_over(
    name: str, gouache: Command, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    where, form, command = PLACES[name]
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    for other, text in (
        ("training/state.json", {"settings": {"steps": 5, "learning_rate": ESCAPES}, "step": 1}),
        ("training/manifest.json", {"files": {ESCAPES: {"bytes": 5}}}),
    ):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(json.dumps(text))
    lora(tmp_path / "peft/adapter_model.safetensors", 1.0)
    (tmp_path / "folder").mkdir()
    wrong = dict[str, str]()
    if found := tried(gouache, command.split()):
        wrong["as it is"] = found
    for kind in KINDS:
        path = tmp_path / where
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        place(kind, path, form)
        if found := tried(gouache, command.split()):
            wrong[kind] = found
    assert not wrong


def test_a_hostile_recipe_in_a_picture_is_one_line(gouache: Command, world: dict[str, Path], tmp_path: Path):
    """Every value of a recipe in turn is a path to a hostile file, or hostile itself."""
    gouache("paint", "cat", "-m", world["model"], "-o", "good.png", "--steps", 1, "--size", "64x64", "--seed", 1)
    with Image.open("good.png") as picture:
        recipe, image = json.loads(picture.text["gouache"]), picture.copy()  # type: ignore[attr-defined]
    place("pipe", tmp_path / "pipe.png")
    place("device", tmp_path / "device.png")
    values = [str(tmp_path / "pipe.png"), str(tmp_path / "device.png"), ESCAPES, 10**400]
    wrong = dict[str, str]()

    def repainted(text: str, title: str) -> None:
        texts = PngInfo()
        texts.add_itxt("gouache", text)
        image.save("hostile.png", pnginfo=texts)
        if found := tried(gouache, ["repaint", "hostile.png"]):
            wrong[title] = found

    for kind, contents in CONTENTS.items():
        repainted(contents["json"], kind)
    recipe["inputs"] = {ESCAPES: ESCAPES}
    repainted(json.dumps(recipe), "inputs")
    recipe["inputs"] = {}
    recipe["versions"] = {ESCAPES: ESCAPES}
    for part, keys in (
        (recipe, ("device", "dtype", "adapters", "splices", ESCAPES)),
        (recipe["request"], ("prompt", "size", "init", "mask", "lora", "vae", "sampler", ESCAPES)),
        (recipe["model"], ("path", "sha256", "family")),
    ):
        for key in keys:
            before = dict(part)
            for value in values:
                part[key] = value
                repainted(json.dumps(recipe), f"{key}: {str(value)[:40]!r}")
            part.clear()
            part.update(before)
    assert not wrong


def test_a_progress_bar_shows_hostile_names_as_text(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Bar() as bar:
        bar.show(f"hashing [/red] [b]x{ESCAPES}", 1, 2)
        bar.close()

    shown = terminal.getvalue()
    assert "[/red] [b]x" in shown
    assert not any(each in shown for each in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\u200b"))


@pytest.mark.parametrize("command", ["models add", "models install"])
def test_a_path_that_must_not_be_read_is_one_line(
    command: str, gouache: Command, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also for the superuser, who may read everything."""
    closed = tmp_path / "closed"
    closed.mkdir()

    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "closed":
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return call

    name = {"models add": "iterdir", "models install": "lstat"}[command]
    monkeypatch.setattr(Path, name, refuse(getattr(Path, name)))

    ended = gouache(*command.split(), closed)

    assert ended.err == f"error: {closed}: cannot be read: Permission denied\n" and ended.code == 2
