"""`inspect`, `convert`, `samplers`, `doctor`, `repaint`: their output as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gouache as package
from gouache.diffusion.samplers import catalog
from gouache.model import residency
from tests.cli.conftest import Command
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]

# A1111's names, and two that it does not have.
SAMPLERS = (
    "DDIM", "PLMS", "Euler", "Euler a", "Heun", "DPM2", "DPM2 a", "LMS", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE",
    "DPM++ 2M SDE", "DPM++ 3M SDE", "UniPC", "DEIS", "DDPM", "LCM",
)  # fmt: skip
SCHEDULES = (
    "Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "Simple", "Normal", "DDIM",
    "Beta",
)  # fmt: skip


def test_every_sampler_and_schedule_is_listed(gouache: Command):
    listed = json.loads(gouache("samplers", "--json").out)
    lines = gouache("samplers").out.splitlines()

    assert set(SAMPLERS) <= {each["name"] for each in listed["samplers"]}
    assert set(SCHEDULES) <= {each["name"] for each in listed["schedules"]}
    for name in (*SAMPLERS, *SCHEDULES):
        assert any(line == name or line.startswith(name + "  ") for line in lines)


def test_every_listed_name_is_understood(gouache: Command):
    listed = json.loads(gouache("samplers", "--json").out)

    for sampler in listed["samplers"]:
        for name in (sampler["name"], *sampler["aliases"]):
            assert catalog.find(name)[0].name == sampler["name"]
        for schedule in listed["schedules"]:
            for ending in (schedule["name"], *schedule["aliases"]):
                expected = sampler["automatic"] if ending == "Automatic" else schedule["name"]
                assert catalog.find(sampler["name"], ending) == (catalog.find(sampler["name"])[0], expected)


def test_inspect_reports_facts_with_their_evidence(gouache: Command, narrow: Narrows):
    page = gouache("inspect", narrow("sd2").file)
    report = json.loads(gouache("inspect", narrow("sd2").file, "--json").out)

    assert page.code == 0 and page.err == ""
    facts = {name: fact["value"] for name, fact in report["facts"].items()}
    assert (facts["kind"], facts["family"], facts["variant"], facts["prediction"]) == ("checkpoint", "sd2", "base", "v")
    assert all(
        fact["evidence"] and fact["confidence"] in ("certain", "likely", "guess") for fact in report["facts"].values()
    )
    assert {part["name"] for part in report["components"]} == {"unet", "vae", "text_encoder"}
    parameters = sum(parameter.numel() for parameter in narrow("sd2").pipeline.unet.parameters())
    assert next(part for part in report["components"] if part["name"] == "unet")["parameters"] == parameters
    assert not report["missing"] and not report["unknown"]
    for fact in facts.values():
        assert fact in page.out


def test_inspect_lists_missing_and_unknown_tensors(gouache: Command, narrow: Narrows, tmp_path: Path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["first_stage_model.quant_conv.bias"]
        tensors["secret"] = torch.zeros(1)

    path = altered(narrow("sd1").file, tmp_path / "model.safetensors", change)

    report = json.loads(gouache("inspect", path, "--json").out)

    assert "quant_conv.bias" in report["missing"]["vae"] and list(report["unknown"]) == ["secret"]


def test_an_override_replaces_what_was_identified_and_is_marked(gouache: Command, narrow: Narrows):
    report = json.loads(gouache("inspect", narrow("sd1").file, "--prediction", "v", "--json").out)

    fact = report["facts"]["prediction"]
    assert (fact["value"], fact["confidence"]) == ("v", "override")


def test_convert_reports_what_it_wrote(gouache: Command, narrow: Narrows, tmp_path: Path):
    report = json.loads(gouache("convert", narrow("sd1").folder, "out.safetensors", "--dtype", "fp16", "--json").out)
    page = gouache("convert", narrow("sd1").folder, "again.safetensors", "--dtype", "fp16")

    tensors = load_file(tmp_path / "out.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert report["tensors"] == len(tensors)
    assert report["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["path"] == "out.safetensors" and report["form"] == "safetensors"
    assert page.code == 0 and page.out.startswith(f"again.safetensors: {len(tensors)} tensors")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("taken.safetensors",), "out: taken.safetensors already exists"),
        (("model.sft2",), "out: model.sft2 ends in neither .safetensors nor .ckpt"),
        (("absent/out.safetensors",), "absent/out.safetensors: cannot be written: its folder does not exist"),
        (("out.safetensors", "--dtype", "int8"), "dtype: 'int8' is not known"),
    ],
)
def test_convert_refuses_in_one_line_and_writes_nothing(
    arguments: tuple[str, ...], line: str, gouache: Command, narrow: Narrows, tmp_path: Path
):
    (tmp_path / "taken.safetensors").write_text("an older file")

    ended = gouache("convert", narrow("sd1").file, *arguments)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {line}") and ended.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]
    assert (tmp_path / "taken.safetensors").read_text() == "an older file"


def test_repaint_exits_with_0_if_identical_and_with_1_if_not(gouache: Command, narrow: Narrows):
    model = ("-m", narrow("sd1").file)
    gouache("paint", "a cat", *model, "-o", "cat.png", "--steps", 1, "--size", "64x64", "--seed", 7)
    gouache("paint", "a cat", "-m", narrow("sd1-inpainting").file, "-o", "other.png", "--steps", 1, "--size", "64x64")

    same, same_json = gouache("repaint", "cat.png", "-o", "again.png"), gouache("repaint", "cat.png", "--json")
    other, other_json = gouache("repaint", "other.png", *model), gouache("repaint", "other.png", *model, "--json")

    assert (same.code, same.out, same.err) == (0, "identical\n", "again.png\n")
    assert json.loads(same_json.out) == {"identical": True, "largest_difference": 0, "causes": []}
    assert Image.open("again.png").tobytes() == Image.open("cat.png").tobytes()
    assert other.code == other_json.code == 1
    assert other.out.startswith("differs: ") and "the model file is another: " in other.out
    report = json.loads(other_json.out)
    assert not report["identical"] and report["largest_difference"] > 0
    assert report["causes"][0].startswith("the model file is another: ")


def test_repaint_refuses_a_picture_without_a_recipe(gouache: Command, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")

    for name, line in (("plain.png", "has no recipe by Gouache"), ("absent.png", "there is no file absent.png")):
        ended = gouache("repaint", name)
        assert ended.code == 2 and line in ended.err and ended.err.count("\n") == 1


def test_doctor_as_text_and_as_json(gouache: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residency, "measure", lambda on: residency.Timings({"fp32": 0.01}, 5, 1.0))

    page, report = gouache("doctor"), json.loads(gouache("doctor", "--json").out)

    assert page.code == 0
    assert {"torch", "devices", "dtypes", "memory", "models", "step"} <= set(report)
    for topic, lines in report.items():
        assert f"\n{topic}" in "\n" + page.out and lines


def test_the_version_of_the_package_is_printed(gouache: Command):
    assert gouache("--version").out == f"gouache {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [("pain",), ("paint",), ("paint", "a cat", "--stepps", "3"), ("paint", "a cat", "--steps", "many"), ("inspect",)],
)
def test_an_invalid_command_line_exits_with_2(arguments: tuple[str, ...], gouache: Command):
    ended = gouache(*arguments)

    assert ended.code == 2 and ended.out == "" and ended.err.startswith("error: ") and ended.err.count("\n") == 1
