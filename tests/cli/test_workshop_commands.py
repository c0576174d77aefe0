"""`scan`, `hash`, `metadata`, `diff`, `prune`, `merge`, `vae`: what they print, as JSON too, and how they end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import Command
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_ends_with_1_for_hostile_files(gouache: Command, tmp_path: Path, as_json: bool):
    save_file({"a": torch.zeros(2)}, tmp_path / "good.safetensors")
    (tmp_path / "bad.ckpt").write_bytes(b"cposix\nsystem\n(S'touch proof'\ntR.")
    options = ["--json"] if as_json else []

    good, bad, missing = (gouache("scan", tmp_path / name, *options) for name in ("good.safetensors", "bad.ckpt", "no"))

    assert (good.code, bad.code, missing.code) == (0, 1, 2)
    if as_json:
        told = json.loads(bad.out)
        assert told["verdict"] == "hostile" and told["intents"][0]["name"] == "posix.system"
    else:
        assert "posix.system('touch proof'): runs a command in a shell" in bad.out
    assert not (tmp_path / "proof").exists()


def test_verdicts_are_counted(gouache: Command, tmp_path: Path):
    for number in range(3):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{number}.safetensors")

    said = gouache("scan", tmp_path)

    assert said.out.splitlines()[-1] == "3 files: 3 safe"
    assert Counter(line.split()[0] for line in said.out.splitlines())["safe"] == 3


def random_file(path: Path, size: int) -> Path:
    save_file({"a": torch.randn(size // 4, generator=torch.Generator().manual_seed(0))}, path, {"one": "entry"})
    return path


def test_the_command_remembers_hashes_until_the_file_changes(gouache: Command, tmp_path: Path):
    path = random_file(tmp_path / "a.safetensors", 3_000_000)

    first = json.loads(gouache("hash", path, "--json").out)
    again = json.loads(gouache("hash", path, "--json").out)
    random_file(path, 2_000_000)
    changed = json.loads(gouache("hash", path, "--json").out)

    assert first == again and first["sha256"] != changed["sha256"]
    assert first["sha256"] in json.dumps(first) and gouache("hash", path).out.startswith(str(path))


def test_metadata_is_shown_and_changed(gouache: Command, tmp_path: Path):
    path = random_file(tmp_path / "a.safetensors", 4000)

    assert gouache("metadata", path).out == "one: entry\n"
    assert gouache("metadata", path, "--set", "two=2=2", "--unset", "one").out == "two: 2=2\n"
    assert json.loads(gouache("metadata", path, "--json").out) == {"two": "2=2"}
    said = gouache("metadata", path, "--set", "no sign")
    assert said.code == 2 and "not of the form KEY=VALUE" in said.err


@pytest.fixture(scope="module")
def moved(narrow: Narrows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name] = tensors[name] * 1.5

    return altered(narrow("sd1").file, tmp_path_factory.mktemp("moved") / "b.safetensors", change)


def test_diff_ends_with_1_where_weights_differ(gouache: Command, narrow: Narrows, moved: Path):
    same, other = gouache("diff", narrow("sd1").file, narrow("sd1").file), gouache("diff", narrow("sd1").file, moved)

    assert same.code == 0 and same.out.endswith("the weights are equal\n")
    assert other.code == 1 and other.out.endswith("the weights differ\n")
    assert not json.loads(gouache("diff", narrow("sd1").file, moved, "--json").out)["equal"]


def test_prune_says_what_it_dropped(gouache: Command, narrow: Narrows, tmp_path: Path):
    file = altered(narrow("sd1").file, tmp_path / "a.safetensors", lambda tensors: tensors.update(junk=torch.zeros(10)))

    said = gouache("prune", file, "out.safetensors", "--dtype", "fp16")
    told = json.loads(gouache("prune", file, "again.safetensors", "--json").out)

    assert said.code == 0 and "dropped  1 tensors" in said.out
    assert told["saved"] == 40 and told["dropped"] == {"no part of a model has them": [1, 40]}


def test_merge_writes_the_model_and_its_recipe(gouache: Command, narrow: Narrows, moved: Path, tmp_path: Path):
    a = narrow("sd1").file

    said = gouache("merge", a, moved, "out.safetensors", "--alpha", "0.25", "--recipe", "r.toml")
    again = json.loads(gouache("merge", "r.toml", "again.safetensors", "--json").out)

    name = "model.diffusion_model.out.2.weight"
    merged, first = load_file(tmp_path / "out.safetensors"), load_file(a)
    torch.testing.assert_close(merged[name], first[name] * 1.125)
    assert said.code == 0 and again["sha256"] in said.out
    refused = gouache("merge", a)
    assert refused.code == 2 and "and then the file to write" in refused.err


def test_a_vae_is_taken_out_and_put_in(gouache: Command, narrow: Narrows, moved: Path, tmp_path: Path):
    assert gouache("vae", "extract", narrow("sd1").file, "vae.safetensors").code == 0
    assert gouache("vae", "bake", moved, "vae.safetensors", "out.safetensors").code == 0

    inside = {name for name in load_file(tmp_path / "out.safetensors") if name.startswith("first_stage_model.")}
    assert {name.removeprefix("first_stage_model.") for name in inside} == load_file(
        tmp_path / "vae.safetensors"
    ).keys()


def test_scanning_needs_no_torch(gouache: Command, tmp_path: Path):
    import subprocess
    import sys

    random_file(tmp_path / "a.safetensors", 4000)
    code = "import sys; from gouache.cli.main import app; sys.argv = ['gouache', 'scan', '.']; "
    code += "\ntry: app()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"

    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0
