"""`gouache paint`: where pictures are saved, what is printed, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gouache.diffusion.samplers.catalog import find
from gouache.images.sheet import GAP
from tests.cli.conftest import Command
from tests.pipelines import Narrow

QUICK = ("--steps", 1, "--size", "64x64", "--seed", 7)


@pytest.fixture
def file(narrow: Callable[[str], Narrow]) -> Path:
    return narrow("sd1").file


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def test_only_the_path_of_the_picture_is_printed(gouache: Command, file: Path, tmp_path: Path):
    ended = gouache("paint", "a cat", "-m", file, "-o", "new/cat.png", *QUICK)

    assert (ended.code, ended.out, ended.err) == (0, "new/cat.png\n", "")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cat.png"]
    assert Image.open("new/cat.png").size == (64, 64)


def test_several_pictures_for_one_file_name_are_numbered(gouache: Command, file: Path):
    ended = gouache("paint", "a cat", "-m", file, "-o", "cat.png", "--count", 10, "--batch", 5, *QUICK)

    assert ended.out.split() == [f"cat-{number:02d}.png" for number in range(1, 11)]
    assert all(Path(name).is_file() for name in ended.out.split())


def test_numbers_continue_in_a_folder(gouache: Command, file: Path, tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "00041-1.png").write_bytes(b"an older picture")
    (folder / "notes-99999.txt").write_text("not counted")

    first = gouache("paint", "a cat", "-m", file, "-o", "out/", "--count", 2, *QUICK)
    second = gouache("paint", "a cat", "-m", file, "-o", "out", *QUICK)

    assert first.out.split() == ["out/00042-7.png", "out/00043-8.png"]
    assert second.out.split() == ["out/00044-7.png"]
    assert (folder / "00041-1.png").read_bytes() == b"an older picture"


def test_pictures_are_saved_in_the_outputs_folder_of_the_settings_by_default(
    gouache: Command, file: Path, monkeypatch: pytest.MonkeyPatch
):
    assert gouache("paint", "a cat", "-m", file, *QUICK).out == "outputs/00000-7.png\n"

    monkeypatch.setenv("GOUACHE_OUTPUT", "elsewhere")
    assert gouache("paint", "a cat", "-m", file, *QUICK).out == "elsewhere/00000-7.png\n"


def test_json_is_one_object_per_picture_with_its_recipe(gouache: Command, file: Path):
    ended = gouache("paint", "a cat", "-n", "dog", "-m", file, "--count", 2, "--json", *QUICK)

    objects = [json.loads(line) for line in ended.out.splitlines()]
    assert [each["seed"] for each in objects] == [7, 8]
    for each in objects:
        assert Path(each["path"]).is_file()
        assert each["request"]["prompt"] == "a cat" and each["request"]["negative"] == "dog"
        assert each["model"]["path"] == str(file) and each["dtype"] == "fp32"


def test_without_a_seed_each_run_paints_another_picture(gouache: Command, file: Path):
    options = ("--steps", 1, "--size", 64, "--json")

    seeds = {json.loads(gouache("paint", "a cat", "-m", file, *options).out)["seed"] for _ in range(3)}

    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("options", "sampler", "schedule"),
    [
        (("--sampler", "DPM++ 2M Karras"), "DPM++ 2M", "Karras"),
        (("--sampler", "DPM++ SDE Exponential", "--schedule", "Karras"), "DPM++ SDE", "Exponential"),
        (("--sampler", "k_euler_ancestral"), "Euler a", "Uniform"),
        (("--sampler", "dpmpp_2m_sde_gpu", "--schedule", "sgm_uniform"), "DPM++ 2M SDE", "SGM Uniform"),
        (("--sampler", "uni_pc", "--schedule", "ddim_uniform"), "UniPC", "DDIM"),
        (("--sampler", "LMS", "--schedule", "Automatic"), "LMS", "Uniform"),
    ],
)
def test_names_of_samplers_in_other_programs_are_understood(
    options: tuple[str, ...], sampler: str, schedule: str, gouache: Command, file: Path
):
    recipe = json.loads(gouache("paint", "a cat", "-m", file, "--json", *QUICK, *options).out)

    assert (recipe["request"]["sampler"], recipe["request"]["schedule"]) == (sampler, schedule)
    assert find(sampler, schedule)[0].name == sampler


def test_every_option_changes_the_picture(gouache: Command, file: Path):
    plain = ("paint", "a (red:1.5) cat", "-m", file, "--steps", 3, "--size", "64x64", "--seed", 7)
    changes = [
        ("--cfg", 3), ("--clip-skip", 2), ("--emphasis", "ignore"), ("--rng", "nv"), ("--negative", "dog"),
        ("--schedule", "Uniform"), ("--variation-seed", 1, "--variation-strength", 0.5), ("--rescale", 0.7),
        ("--prediction", "v"), ("--dtype", "bf16"), ("--sampler", "DDIM", "--eta", 1),
        ("--hires", 1.5), ("--hires", 1.0, "--hires-strength", 0.3), ("--hires", 1.0, "--hires-steps", 2),
    ]  # fmt: skip

    pictures = [np.asarray(Image.open(gouache(*plain, *change).out.strip())).tobytes() for change in [(), *changes]]

    assert len(set(pictures)) == len(pictures)


REFUSED = [
    (("--size", "65x64"), "size: 65x64 cannot be used; sides are multiples of 8"),
    (("--size", "0x64"), "size: 0x64 cannot be used"),
    (("--size", "64x"), "size: '64x' is not a size; write WIDTHxHEIGHT"),
    (("--size", "big"), "size: 'big' is not a size"),
    (("--size", "99999x64"), "size: 99999x64 cannot be used"),
    (("--sampler", "Eular a"), "sampler: 'Eular a' is not known; did you mean 'Euler a'"),
    (("--sampler", "DPM++ 2N Karras"), "sampler: 'DPM++ 2N Karras' is not known; did you mean 'DPM++ 2M"),
    (("--schedule", "Karas"), "schedule: 'Karas' is not known; did you mean 'Karras'"),
    (("--steps", "0"), "steps: 0 cannot be used"),
    (("--steps", "1001"), "steps: 1001 cannot be used"),
    (("--cfg", "-1"), "cfg: -1.0 cannot be used"),
    (("--cfg", "nan"), "cfg: nan cannot be used"),
    (("--seed", "-2"), "seed: -2 cannot be used"),
    (("--count", "0"), "count: 0 cannot be used"),
    (("--clip-skip", "5"), "clip_skip: is 5, but the text encoder text_encoder has layers 1 to 4"),
    (("--strength", "2"), "strength: 2.0 cannot be used"),
    (("--init", "absent.png"), "init: there is no file "),
    (("--mask", "absent.png"), "mask: there is no file "),
    (("--mask", "{picture}"), "mask: needs a picture to change; give it as init"),
    (("--emphasis", "loud"), "emphasis: 'loud' is not known; use original or no norm or"),
    (("--rng", "gpu"), "rng: 'gpu' is not known; use cpu or nv"),
    (("--device", "gpu"), "device: 'gpu' is not a device"),
    (("--dtype", "int8"), "dtype: 'int8' is not known"),
    (("--prediction", "x0"), "prediction: 'x0' is "),
    (("--family", "sd9"), "family: "),
    (("--eta", "0.5"), "eta: DPM++ 2M has no eta"),
    (("--hires", "big"), "hires: 'big' is neither a factor, such as 2.0, nor a size, such as 1024x768"),
    (("--hires", "0.5"), "hires: 0.5 cannot be used"),
    (("--hires", "2", "--hires-upscaler", "esrgan"), "hires_upscaler: 'esrgan' is not known"),
    (("--hires", "2", "--hires-sampler", "Eular"), "sampler: 'Eular' is not known"),
    (("--hires", "2", "--hires-schedule", "Karas"), "schedule: 'Karas' is not known"),
    (("--hires", "2", "--hires-strength", "0"), "hires_strength: 0 is too small for"),
    (("--init", "{picture}", "--strength", "0.3"), "strength: 0.3 leaves no steps to run (0 of 1); raise"),
    (("--refiner", "absent", "--refiner-at", "0.1", "--steps", "4"), "refiner: there is no file 'absent'"),
    (("-o", "cat.jpg"), "output: cat.jpg does not end in .png"),
    (("-m", "no-such-model"), "model: there is no file 'no-such-model'"),
]


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_an_invalid_option_is_one_line_and_exit_code_two_and_nothing_is_written(
    options: tuple[str, ...], line: str, gouache: Command, file: Path, picture: Path, tmp_path: Path
):
    ended = gouache("paint", "a cat", "-m", file, *QUICK, *(each.format(picture=picture) for each in options))

    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith(f"error: {line}") and ended.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--sampler", "Eular"), "error: sampler: "),
        (("--hires-sampler", "Eular"), "error: sampler: "),
        (("--init", "absent.png"), "error: init: there is no file "),
        (("--depth", "absent.png"), "error: depth: there is no file "),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_opened(options: tuple[str, ...], line: str, gouache: Command):
    ended = gouache("paint", "a cat", "-m", "no-such-model", *options)

    assert ended.err.startswith(line)


def test_a_file_in_place_of_the_folder_is_refused_in_one_line(gouache: Command, file: Path, tmp_path: Path):
    (tmp_path / "taken").write_text("a file")

    ended = gouache("paint", "a cat", "-m", file, "-o", "taken/cat.png", *QUICK)

    assert ended.code == 2 and ended.err.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "a file"


def test_notes_are_printed_on_the_error_stream_only(gouache: Command, file: Path):
    ended = gouache("paint", "a cat <dog:1>", "-m", file, "--json", *QUICK)

    assert ended.code == 0
    assert ended.err == "note: <dog:1> in the prompt is read as plain text\n"
    assert json.loads(ended.out)


def test_an_interrupt_while_loading_ends_with_130(gouache: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from gouache.app import loading

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupted)

    ended = gouache("paint", "a cat")

    assert ended.code == 130 and "Traceback" not in ended.err
    assert not any(tmp_path.iterdir())


HIRES = (
    "--hires", "96x128", "--hires-steps", 2, "--hires-strength", 0.5, "--hires-upscaler", "bicubic", "--hires-sampler",
    "Euler a", "--hires-prompt", "a dog, sharp", "--hires-negative", "blurry",
)  # fmt: skip


def test_hires_options_are_in_the_recipe_and_in_the_parameters(gouache: Command, file: Path):
    ended = gouache("paint", "a cat", "-m", file, "--json", *QUICK, *HIRES)

    recipe = json.loads(ended.out)
    hires = {name: value for name, value in recipe["request"].items() if name.startswith("hires")}
    assert hires == {
        "hires": "96x128", "hires_steps": 2, "hires_strength": 0.5, "hires_upscaler": "bicubic",
        "hires_sampler": "Euler a", "hires_schedule": "Uniform", "hires_prompt": "a dog, sharp",
        "hires_negative": "blurry",
    }  # fmt: skip
    assert recipe["request"]["size"] == "64x64"
    picture = Image.open(recipe["path"])
    assert picture.size == (96, 128)
    fields = picture.text["parameters"].splitlines()[-1]  # type: ignore[attr-defined]
    assert (
        "Size: 64x64, Denoising strength: 0.5, Hires resize: 96x128, Hires steps: 2, Hires upscaler: Latent (bicubic), "
        'Hires sampler: Euler a, Hires schedule type: Uniform, Hires prompt: "a dog, sharp", '
        "Hires negative prompt: blurry, "
    ) in fields
    assert gouache("repaint", recipe["path"]).out == "identical\n"


def test_explain_prints_how_the_prompts_are_read_and_paints_nothing(gouache: Command, tmp_path: Path):
    """Without a model: the named one does not exist."""
    prompt = "a [red|blue] (cat:1.2) <lora:style:0.8> AND rain :0.5"

    ended = gouache(
        "paint", prompt, "-n", "dog", "-m", "no-such-model", "--explain", "--steps", 4, "--hires", 2, "--hires-prompt",
        "a tiger",
    )  # fmt: skip

    assert (ended.code, ended.err) == (0, "") and not any(tmp_path.iterdir())
    lines = ended.out.splitlines()
    titles = [line for line in lines if line.startswith(("prompt:", "negative prompt:", "hires prompt:", "hires neg"))]
    assert titles == ["prompt: a [red|blue] (cat:1.2)  AND rain :0.5", "negative prompt: dog", "hires prompt: a tiger"]
    assert any("<lora:style:0.8>" in line for line in lines)
    assert "part 1 of 2, weight 1" in ended.out and "part 2 of 2, weight 0.5" in ended.out
    assert "steps 1, 3" in ended.out and "steps 2, 4" in ended.out


def test_a_steps_sheet_is_written_for_every_picture(gouache: Command, file: Path):
    """With the x0 of its own steps, in whichever batch it was painted."""
    options = ("-m", file, "--steps", 3, "--size", "64x64", "--steps-sheet", "--sampler", "Euler")

    ended = gouache("paint", "a cat", *options, "-o", "a.png", "--seed", 7, "--count", 3, "--batch", 2)
    alone = gouache("paint", "a cat", *options, "-o", "alone.png", "--seed", 8)

    names = ["a-1", "a-2", "a-3"]
    assert ended.out.split() == [f"{name}{end}.png" for name in names for end in ("", "-steps")]
    assert alone.out.split() == ["alone.png", "alone-steps.png"] and ended.err == alone.err == ""
    second, single, third = (np.asarray(Image.open(f"{name}-steps.png"), np.int16) for name in ("a-2", "alone", "a-3"))
    assert np.abs(second - single).max() <= 1 and np.abs(third - single).max() > 1


def test_the_last_tile_of_a_steps_sheet_is_the_picture(gouache: Command, file: Path):
    """Euler's last step goes to sigma 0, so its result is x0."""
    gouache("paint", "a cat", "-m", file, "-o", "a.png", "--steps-sheet", "--sampler", "Euler", *QUICK)

    sheet, picture = Image.open("a-steps.png"), Image.open("a.png")
    left, top = (sheet.width - 64 - GAP if sheet.width < 2 * 64 else GAP), sheet.height - 64 - GAP
    assert sheet.crop((left, top, left + 64, top + 64)).tobytes() == picture.tobytes()


def test_a_steps_sheet_has_the_steps_of_both_passes_at_the_larger_size(gouache: Command, file: Path):
    options = ("-m", file, "-o", "a.png", "--steps-sheet", "--json", *QUICK)

    ended = gouache("paint", "a cat", *options, "--hires", "96x128", "--hires-steps", 3)

    assert ended.code == 0 and json.loads(ended.out)["path"] == "a.png" and ended.err == "a-steps.png\n"
    sheet = Image.open("a-steps.png")
    assert sheet.height > 2 * 128  # four steps, two rows


def test_the_refiner_option_runs_the_last_steps(gouache: Command, file: Path):
    options = ("paint", "a cat", "-m", file, "--steps", 4, "--size", "64x64", "--seed", 7)

    plain, refined = gouache(*options, "-o", "plain.png"), gouache(*options, "-o", "a.png", "--refiner", file, "--json")

    recipe = json.loads(refined.out)
    assert plain.code == refined.code == 0
    assert recipe["refiner"]["path"] == str(file) and recipe["request"]["refiner_at"] == 0.8
    assert "Refiner switch at: 0.8" in Image.open("a.png").text["parameters"]  # type: ignore[attr-defined]
