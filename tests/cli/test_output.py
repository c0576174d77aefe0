"""Where pictures go: checked before the first step, claimed exclusively, never overwritten without being asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import zeros

from gouache.cli.output import Output
from gouache.errors import GouacheError
from gouache.generate.picture import Picture
from tests.cli.conftest import Command
from tests.cli.test_paint import QUICK


def picture(seed: int = 7) -> Picture:
    return Picture(Image.new("RGB", (8, 8)), zeros(4, 1, 1), seed, {"request": {}}, "")


def output(text: str | None, default: Path, **options: Any) -> Output:
    return Output(text, default, **{"count": 1, "overwrite": False} | options)


def test_numbers_go_on_past_five_digits(tmp_path: Path):
    (tmp_path / "99999-1.png").touch()
    saved = [output(None, tmp_path).save(picture(), index) for index in range(3)]

    assert [path.name for path in saved] == ["100000-7.png", "100001-7.png", "100002-7.png"]


def test_several_programs_in_one_folder_lose_no_picture(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from tests.cli.test_output import output, picture\n"
        "target = output(None, Path(sys.argv[1]))\n"
        "for index in range(25): target.save(picture(), index)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]

    assert [each.wait(120) for each in running] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.png"))) == 75 and len(list(tmp_path.iterdir())) == 75


def test_a_named_file_is_not_replaced_unless_asked(tmp_path: Path):
    named = tmp_path / "cat.png"
    assert output(str(named), tmp_path).save(picture(), 0) == named
    with pytest.raises(GouacheError, match="--overwrite"):
        output(str(named), tmp_path)

    assert output(str(named), tmp_path, overwrite=True).save(picture(8), 0) == named


def test_a_name_that_is_taken_meanwhile_costs_no_picture(tmp_path: Path):
    target = output(str(tmp_path / "cat.png"), tmp_path)
    (tmp_path / "cat.png").write_bytes(b"another program's")

    assert target.save(picture(), 0).name == "00000-7.png"
    assert (tmp_path / "cat.png").read_bytes() == b"another program's"


@pytest.mark.parametrize(
    "name", ["cat.jpg", "cat.jxl", "cat.v1", "cat.tar.gz", "-", ".png", "new/.PNG", "file/cat.png", "file/"]
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(name: str, tmp_path: Path):
    (tmp_path / "file").touch()

    with pytest.raises(GouacheError) as refused:
        output(name if name == "-" else str(tmp_path) + "/" + name, tmp_path)

    assert "\n" not in str(refused.value)


def test_a_folder_may_have_a_suffix_if_it_ends_in_a_slash(tmp_path: Path):
    assert output(f"{tmp_path}/x.png/", tmp_path).save(picture(), 0) == tmp_path / "x.png" / "00000-7.png"


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir(mode=0o500)
    # Root may write anywhere: what the system would answer another user.
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path).name == "closed"))

    with pytest.raises(GouacheError, match="no permission"):
        output(str(tmp_path / "closed" / "cat.png"), tmp_path)


def run(*arguments: bytes | str, stdout: int | None = None, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "gouache", "paint", *arguments, *map(str, QUICK), "--size", "8x8"]
    return subprocess.run(
        command, stdout=subprocess.PIPE if stdout is None else stdout, stderr=subprocess.PIPE,
        env={**os.environ, **variables}, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="arguments are bytes on POSIX only")
def test_text_that_is_not_utf8_is_refused_before_the_first_step(tmp_path: Path):
    ended = run(b"caf\xe9", "-o", f"{tmp_path}/out/")

    assert ended.returncode == 2 and ended.stderr.startswith(b"error: prompt: has bytes that are not text in UTF-8")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
def test_output_that_is_full_or_of_another_encoding_loses_no_picture(tmp_path: Path):
    odd = run("a 猫", "-o", f"{tmp_path}/猫/", PYTHONIOENCODING="ascii")
    assert odd.returncode == 0 and len(list((tmp_path / "猫").glob("*.png"))) == 1

    with open("/dev/full", "wb") as full:  # noqa: PTH123
        ended = run("a cat", "-o", f"{tmp_path}/full/", stdout=full.fileno())
    assert ended.returncode == 2 and b"Traceback" not in ended.stderr and ended.stderr.count(b"error: ") == 1
    assert len(list((tmp_path / "full").glob("*.png"))) == 1


def test_what_is_too_large_for_the_memory_is_one_line(gouache: Command):
    ended = gouache("paint", "a cat", "--size", "16384x16384", "--steps", "1")

    assert ended.code == 2 and ended.err.count("\n") == 1 and "GB of memory" in ended.err
