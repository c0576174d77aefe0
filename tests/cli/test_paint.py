"""`gouache paint`: where pictures go, what is printed, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gouache.diffusion.samplers.catalog import find
from tests.cli.conftest import Command
from tests.pipelines import Narrow

QUICK = ("--steps", 1, "--size", "64x64", "--seed", 7)


@pytest.fixture
def file(narrow: Callable[[str], Narrow]) -> Path:
    return narrow("sd1").file


def test_a_named_file_is_written_and_its_path_is_all_that_is_printed(gouache: Command, file: Path, tmp_path: Path):
    ended = gouache("paint", "a cat", "-m", file, "-o", "new/cat.png", *QUICK)

    assert (ended.code, ended.out, ended.err) == (0, "new/cat.png\n", "")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cat.png"]
    assert Image.open("new/cat.png").size == (64, 64)


def test_several_pictures_in_a_named_file_are_numbered(gouache: Command, file: Path):
    ended = gouache("paint", "a cat", "-m", file, "-o", "cat.png", "--count", 10, "--batch", 5, *QUICK)

    assert ended.out.split() == [f"cat-{number:02d}.png" for number in range(1, 11)]
    assert all(Path(name).is_file() for name in ended.out.split())


def test_a_folder_goes_on_counting_where_it_stands(gouache: Command, file: Path, tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "00041-1.png").write_bytes(b"an older picture")
    (folder / "notes-99999.txt").write_text("not counted")

    first = gouache("paint", "a cat", "-m", file, "-o", "out/", "--count", 2, *QUICK)
    second = gouache("paint", "a cat", "-m", file, "-o", "out", *QUICK)

    assert first.out.split() == ["out/00042-7.png", "out/00043-8.png"]
    assert second.out.split() == ["out/00044-7.png"]
    assert (folder / "00041-1.png").read_bytes() == b"an older picture"


def test_without_a_target_pictures_go_to_the_outputs_folder_of_the_settings(
    gouache: Command, file: Path, monkeypatch: pytest.MonkeyPatch
):
    assert gouache("paint", "a cat", "-m", file, *QUICK).out == "outputs/00000-7.png\n"

    monkeypatch.setenv("GOUACHE_OUTPUT", "elsewhere")
    assert gouache("paint", "a cat", "-m", file, *QUICK).out == "elsewhere/00000-7.png\n"


def test_json_is_one_object_a_picture_with_its_recipe(gouache: Command, file: Path):
    ended = gouache("paint", "a cat", "-n", "dog", "-m", file, "--count", 2, "--json", *QUICK)

    told = [json.loads(line) for line in ended.out.splitlines()]
    assert [each["seed"] for each in told] == [7, 8]
    for each in told:
        assert Path(each["path"]).is_file()
        assert each["request"]["prompt"] == "a cat" and each["request"]["negative"] == "dog"
        assert each["model"]["path"] == str(file) and each["dtype"] == "fp32"


def test_without_a_seed_each_run_paints_another_picture(gouache: Command, file: Path):
    knobs = ("--steps", 1, "--size", 64, "--json")

    seeds = {json.loads(gouache("paint", "a cat", "-m", file, *knobs).out)["seed"] for _ in range(3)}

    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("said", "sampler", "schedule"),
    [
        (("--sampler", "DPM++ 2M Karras"), "DPM++ 2M", "Karras"),
        (("--sampler", "DPM++ SDE Exponential", "--schedule", "Karras"), "DPM++ SDE", "Exponential"),
        (("--sampler", "k_euler_ancestral"), "Euler a", "Uniform"),
        (("--sampler", "dpmpp_2m_sde_gpu", "--schedule", "sgm_uniform"), "DPM++ 2M SDE", "SGM Uniform"),
        (("--sampler", "uni_pc", "--schedule", "ddim_uniform"), "UniPC", "DDIM"),
        (("--sampler", "LMS", "--schedule", "Automatic"), "LMS", "Uniform"),
    ],
)
def test_samplers_go_by_every_name_users_know(
    said: tuple[str, ...], sampler: str, schedule: str, gouache: Command, file: Path
):
    told = json.loads(gouache("paint", "a cat", "-m", file, "--json", *QUICK, *said).out)

    assert (told["request"]["sampler"], told["request"]["schedule"]) == (sampler, schedule)
    assert find(sampler, schedule)[0].name == sampler


def test_the_knobs_reach_the_picture(gouache: Command, file: Path):
    plain = ("paint", "a (red:1.5) cat", "-m", file, "--steps", 3, "--size", "64x64", "--seed", 7)
    changes = [
        ("--cfg", 3), ("--clip-skip", 2), ("--emphasis", "ignore"), ("--rng", "nv"), ("--negative", "dog"),
        ("--schedule", "Uniform"), ("--variation-seed", 1, "--variation-strength", 0.5), ("--rescale", 0.7),
        ("--prediction", "v"), ("--dtype", "bf16"), ("--sampler", "DDIM", "--eta", 1),
    ]  # fmt: skip

    pictures = [np.asarray(Image.open(gouache(*plain, *change).out.strip())).tobytes() for change in [(), *changes]]

    assert len(set(pictures)) == len(pictures)


REFUSED = [
    (("--size", "65x64"), "size: 65x64 cannot be painted; sides are multiples of 8"),
    (("--size", "0x64"), "size: 0x64 cannot be painted"),
    (("--size", "64x"), "size: '64x' is not a size; write WIDTHxHEIGHT"),
    (("--size", "big"), "size: 'big' is not a size"),
    (("--size", "99999x64"), "size: 99999x64 cannot be painted"),
    (("--sampler", "Eular a"), "sampler: 'Eular a' is not known; did you mean 'Euler a'"),
    (("--sampler", "DPM++ 2N Karras"), "sampler: 'DPM++ 2N Karras' is not known; did you mean 'DPM++ 2M"),
    (("--schedule", "Karas"), "schedule: 'Karas' is not known; did you mean 'Karras'"),
    (("--steps", "0"), "steps: 0 cannot be used"),
    (("--steps", "1001"), "steps: 1001 cannot be used"),
    (("--cfg", "-1"), "cfg: -1.0 cannot be used"),
    (("--cfg", "nan"), "cfg: nan cannot be used"),
    (("--seed", "-1"), "seed: -1 cannot be used"),
    (("--count", "0"), "count: 0 cannot be used"),
    (("--clip-skip", "5"), "clip_skip: is 5, but the text encoder text_encoder has layers 1 to 4"),
    (("--strength", "2"), "strength: 2.0 cannot be used"),
    (("--init", "absent.png"), "init: there is no file absent.png"),
    (("--mask", "mask.png"), "mask: needs a picture"),
    (("--emphasis", "loud"), "emphasis: 'loud' is not known"),
    (("--rng", "gpu"), "rng: 'gpu' is not known; use cpu or nv"),
    (("--device", "gpu"), "device: 'gpu' is not a device"),
    (("--dtype", "int8"), "dtype: 'int8' is not known"),
    (("--prediction", "x0"), "prediction: 'x0' is not known"),
    (("--family", "sd9"), "family: "),
    (("--eta", "0.5"), "eta: DPM++ 2M adds no noise"),
    (("-o", "cat.jpg"), "output: cat.jpg does not end in .png"),
    (("-m", "no-such-model"), "model: there is no file 'no-such-model'"),
]


@pytest.mark.parametrize(("said", "line"), REFUSED, ids=[" ".join(said) for said, _ in REFUSED])
def test_a_mistake_is_one_line_and_exit_code_two_and_nothing_is_written(
    said: tuple[str, ...], line: str, gouache: Command, file: Path, tmp_path: Path
):
    ended = gouache("paint", "a cat", "-m", file, *QUICK, *said)

    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith(f"error: {line}") and ended.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_misspelt_name_is_refused_before_the_model_is_opened(gouache: Command):
    ended = gouache("paint", "a cat", "-m", "no-such-model", "--sampler", "Eular")

    assert ended.err.startswith("error: sampler: ")


def test_a_file_where_the_folder_should_be_is_one_line(gouache: Command, file: Path, tmp_path: Path):
    (tmp_path / "taken").write_text("a file")

    ended = gouache("paint", "a cat", "-m", file, "-o", "taken/cat.png", *QUICK)

    assert ended.code == 2 and ended.err.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "a file"


def test_remarks_go_to_the_error_stream_only(gouache: Command, file: Path):
    ended = gouache("paint", "a cat [dog|cow]", "-m", file, "--json", *QUICK)

    assert ended.code == 0
    assert ended.err == "note: [dog|cow] in the prompt is read as plain text for now\n"
    assert json.loads(ended.out)


def test_an_interrupt_while_loading_ends_with_130(gouache: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from gouache import face

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(face, "load", interrupted)

    ended = gouache("paint", "a cat")

    assert ended.code == 130 and "Traceback" not in ended.err
    assert not any(tmp_path.iterdir())
