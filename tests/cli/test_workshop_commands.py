"""`scan`, `hash`, `metadata`, `diff`, `convert`, `prune`, `merge`, `vae`, `lora`: output, JSON and exit codes."""

from __future__ import annotations

import json
import re
import time
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
def test_scan_exits_with_1_for_hostile_files(gouache: Command, tmp_path: Path, as_json: bool):
    save_file({"a": torch.zeros(2)}, tmp_path / "good.safetensors")
    (tmp_path / "bad.ckpt").write_bytes(b"cposix\nsystem\n(S'touch proof'\ntR.")
    options = ["--json"] if as_json else []

    good, bad, missing = (gouache("scan", tmp_path / name, *options) for name in ("good.safetensors", "bad.ckpt", "no"))

    assert (good.code, bad.code, missing.code) == (0, 1, 2)
    if as_json:
        found = json.loads(bad.out)
        assert found["verdict"] == "hostile" and found["intents"][0]["name"] == "posix.system"
    else:
        assert "posix.system('touch proof'): runs a command in a shell" in bad.out
    assert not (tmp_path / "proof").exists()


def test_scan_counts_the_verdicts(gouache: Command, tmp_path: Path):
    for number in range(3):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{number}.safetensors")

    result = gouache("scan", tmp_path)

    assert result.out.splitlines()[-1] == "3 files: 3 safe"
    assert Counter(line.split()[0] for line in result.out.splitlines())["safe"] == 3
    assert gouache("scan", tmp_path / "0.safetensors").out.splitlines()[-1] == "1 file: 1 safe"


def random_file(path: Path, size: int) -> Path:
    save_file({"a": torch.randn(size // 4, generator=torch.Generator().manual_seed(0))}, path, {"one": "entry"})
    return path


def test_hash_caches_hashes_until_the_file_changes(gouache: Command, tmp_path: Path):
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
    changed = gouache("metadata", path, "--set", "two=2=2", "--unset", "one")
    assert changed.out == "two: 2=2\n" and changed.err == f"saved in {path}\n"
    assert json.loads(gouache("metadata", path, "--json").out) == {"two": "2=2"}
    refused = gouache("metadata", path, "--set", "no equals sign")
    assert refused.code == 2 and "'no equals sign' is not KEY=VALUE" in refused.err


@pytest.fixture(scope="module")
def tuned(narrow: Narrows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Narrow SD1 with every weight of its U-Net multiplied by 1.5."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name] = tensors[name] * 1.5

    return altered(narrow("sd1").file, tmp_path_factory.mktemp("tuned") / "b.safetensors", change)


def test_diff_exits_with_1_if_weights_differ(gouache: Command, narrow: Narrows, tuned: Path):
    same, other = gouache("diff", narrow("sd1").file, narrow("sd1").file), gouache("diff", narrow("sd1").file, tuned)

    assert same.code == 0 and same.out.endswith("the weights are equal\n")
    assert other.code == 1 and other.out.endswith("the weights differ\n")
    assert not json.loads(gouache("diff", narrow("sd1").file, tuned, "--json").out)["equal"]


def test_diff_compares_models_of_two_layouts(gouache: Command, narrow: Narrows, tuned: Path):
    same, other = (gouache("diff", file, narrow("sd1").folder) for file in (narrow("sd1").file, tuned))

    assert same.code == 0 and same.out.endswith("the weights are equal\n")
    assert other.code == 1 and other.out.endswith("the weights differ\n")


def test_diff_of_models_that_share_nothing(gouache: Command, narrow: Narrows, tmp_path: Path):
    random_file(tmp_path / "a.safetensors", 4000)

    result = gouache("diff", "a.safetensors", narrow("sd1").folder)

    assert result.code == 1
    assert result.out.splitlines()[-1] == "the models have no component and no tensor name in common"


@pytest.mark.parametrize(
    ("dtype", "verified"),
    [
        ("", "equal to the source"),
        ("fp32", "equal to the source, in fp32"),
        ("bf16", "equal to the source rounded to bf16"),
        ("fp8_e4m3", "equal to the source rounded to fp8_e4m3 (vectors to fp16)"),
    ],
)
def test_convert_states_what_was_verified(gouache: Command, tmp_path: Path, dtype: str, verified: str):
    save_file({"a": torch.randn(4, 4).half()}, tmp_path / "a.safetensors")

    options = ["--dtype", dtype] if dtype else []
    result = gouache("convert", "a.safetensors", "b.safetensors", *options)

    assert result.code == 0 and result.out.startswith("b.safetensors: 1 tensor, ")
    assert result.out.endswith(f"verified: {verified}\n")


def test_prune_lists_dropped_tensors_and_bytes_saved(gouache: Command, narrow: Narrows, tmp_path: Path):
    file = altered(narrow("sd1").file, tmp_path / "a.safetensors", lambda tensors: tensors.update(junk=torch.zeros(10)))

    done = gouache("prune", file, "out.safetensors")
    as_json = json.loads(gouache("prune", file, "again.safetensors", "--json").out)

    assert done.code == 0 and "dropped  1 tensor, 0.0 MB: not part of any component" in done.out
    assert as_json["saved"] == 40 and as_json["dropped"] == {"not part of any component": [1, 40]}


def test_prune_counts_the_bytes_saved_by_a_narrower_dtype(gouache: Command, narrow: Narrows, tmp_path: Path):
    file = narrow("sd1").file

    done = gouache("prune", file, "half.safetensors", "--dtype", "fp16")
    as_json = json.loads(gouache("prune", file, "again.safetensors", "--dtype", "fp16", "--json").out)
    wider = gouache("prune", "half.safetensors", "wide.safetensors", "--dtype", "fp32")

    before, after = (sum(t.nbytes for t in load_file(path).values()) for path in (file, tmp_path / "half.safetensors"))
    assert as_json["saved"] == as_json["cast_saved"] == before - after > before // 3
    assert f"in all, {(before - after) / 1e6:,.1f} MB smaller than the source" in done.out
    assert f"cast to fp32  {(before - after) / 1e6:,.1f} MB larger" in wider.out


def test_merge_writes_the_model_and_its_recipe(gouache: Command, narrow: Narrows, tuned: Path, tmp_path: Path):
    a = narrow("sd1").file

    done = gouache("merge", a, tuned, "out.safetensors", "--alpha", "0.25", "--recipe", "r.toml")
    again = json.loads(gouache("merge", "r.toml", "again.safetensors", "--json").out)

    name = "model.diffusion_model.out.2.weight"
    merged, first = load_file(tmp_path / "out.safetensors"), load_file(a)
    torch.testing.assert_close(merged[name], first[name] * 1.125)
    assert done.code == 0 and again["sha256"] in done.out
    refused = gouache("merge", a)
    assert refused.code == 2 and "then the file to write" in refused.err


def test_lora_extract_reports_skipped_convolutions_apart_from_unchanged_weights(
    gouache: Command, narrow: Narrows, tuned: Path
):
    options = ["--rank", "64", "--no-text"]
    without = gouache("lora", "extract", tuned, narrow("sd1").file, "a.safetensors", *options)
    with_convolutions = gouache(
        "lora", "extract", tuned, narrow("sd1").file, "b.safetensors", *options, "--conv-rank", "16"
    )

    assert "100.0% of the difference" not in without.out
    number = re.search(r"skipped (\d+) 3x3 convolutions \(use --conv-rank to include them\); 0 weights", without.out)
    assert number is not None and int(number[1]) > 10
    assert "skipped" not in with_convolutions.out and "unchanged" not in with_convolutions.out


def test_a_vae_is_extracted_and_baked(gouache: Command, narrow: Narrows, tuned: Path, tmp_path: Path):
    assert gouache("vae", "extract", narrow("sd1").file, "vae.safetensors").code == 0
    assert gouache("vae", "bake", tuned, "vae.safetensors", "out.safetensors").code == 0

    inside = {name for name in load_file(tmp_path / "out.safetensors") if name.startswith("first_stage_model.")}
    assert {name.removeprefix("first_stage_model.") for name in inside} == load_file(
        tmp_path / "vae.safetensors"
    ).keys()


def test_scan_does_not_import_torch(gouache: Command, tmp_path: Path):
    import subprocess
    import sys

    random_file(tmp_path / "a.safetensors", 4000)
    code = "import sys; from gouache.cli.main import app; sys.argv = ['gouache', 'scan', '.']; "
    code += "\ntry: app()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"

    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0


def test_ten_thousand_unknown_names_take_seconds(gouache: Command, narrow: Narrows, tmp_path: Path):
    names = [f"{number:06d}{'a' * 20}" for number in range(10_000)]
    unknown = {name: torch.zeros(1) for name in names}
    save_file(unknown, tmp_path / "unknown.safetensors")
    base = narrow("sd1").file
    inside = {f"model.diffusion_model.{name}": tensor.clone() for name, tensor in unknown.items()}
    save_file({**load_file(base), **unknown, **inside}, tmp_path / "model.safetensors")
    paint = ["--steps", "1", "--size", "64x64"]

    start = time.process_time()
    inspected = [gouache("inspect", f"{name}.safetensors") for name in ("unknown", "model")]
    refused = [
        gouache("paint", "a cat", "-m", "model.safetensors", *paint),
        gouache("paint", "a cat", "-m", base, "--lora", "unknown.safetensors", *paint),
        gouache("convert", "unknown.safetensors", "folder"),
    ]
    seconds = time.process_time() - start

    assert [each.code for each in inspected] == [0, 0] and inspected[1].out.count("not recognised  10000 tensors") == 2
    assert [each.code for each in refused] == [2, 2, 2]
    assert seconds < 25  # about 5 on one core; the comparison of each name with each other took minutes


def test_columns_of_inspect_are_two_spaces_apart(gouache: Command, tmp_path: Path):
    layers = {
        f"linear.{number}.{leaf}": torch.zeros(64, *[64] * (leaf == "weight"))
        for number in (0, 1)
        for leaf in ("weight", "bias")
    }
    wide = {name: torch.zeros(128, *[128] * (tensor.ndim - 1)) for name, tensor in layers.items()}
    torch.save({"activate_output": False, 64: (layers, layers), 128: (wide, wide)}, tmp_path / "rosy.pt")

    lines = [line.strip() for line in gouache("inspect", "rosy.pt").out.splitlines()]

    assert any(
        re.fullmatch(r"activates its output  False  +stored in the file: activate_output", line) for line in lines
    )
    assert any(line.endswith("not recognised (context widths 64, 128 match no released model)") for line in lines)


def test_a_lora_of_mini_is_renamed_to_peft_and_back(gouache: Command, tmp_path: Path):
    """mini's widths, and so the levels with a shortcut, are others than those of the released SD1."""
    import gouache as package

    mini = next((Path(package.__file__).parent / "embedded").glob("mini*.safetensors"))

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.startswith("model.") and tensors[name].is_floating_point():
                tensors[name] = tensors[name] * 1.25

    tuned = altered(mini, tmp_path / "tuned.safetensors", change)
    options = ["--rank", "2", "--conv-rank", "1", "--no-text"]
    assert gouache("lora", "extract", tuned, mini, "kohya.safetensors", *options).code == 0
    assert gouache("lora", "rename", "kohya.safetensors", "peft.safetensors", "--to", "peft").code == 0
    assert gouache("lora", "rename", "peft.safetensors", "back.safetensors", "--to", "kohya").code == 0

    first, back = (load_file(tmp_path / f"{name}.safetensors") for name in ("kohya", "back"))
    assert "lora_unet_down_blocks_3_resnets_0_conv_shortcut.alpha" in first
    assert first.keys() == back.keys() and all(torch.equal(first[name], back[name]) for name in first)
    assert all(name.startswith("unet.") for name in load_file(tmp_path / "peft.safetensors"))
