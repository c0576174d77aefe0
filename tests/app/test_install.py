"""`install` from a path, from a faulty web server on loopback, and from a repository on that server."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gouache.app.download import download
from gouache.app.install import install
from gouache.app.settings import Settings
from gouache.errors import FileError, RequestError, UnsafeFile
from tests.app.model_files import embedding, lora
from tests.app.server import Site, repository, serving

HOSTILE = b"cposix\nsystem\n(S'touch proof'\ntR."


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> Settings:
    return replace(settings, models=(), cache=tmp_path / "cache", data=tmp_path / "data")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as served:
        yield served


@pytest.fixture
def style(tmp_path: Path) -> bytes:
    return lora(tmp_path / "made/style.safetensors", 1.0).read_bytes()


def data_files(settings: Settings) -> list[str]:
    """All files in the data folder."""
    return sorted(path.relative_to(settings.data).as_posix() for path in settings.data.rglob("*") if path.is_file())


def test_a_file_is_installed_in_the_folder_of_its_category(own: Settings, tmp_path: Path):
    one = install(str(lora(tmp_path / "style.safetensors")), own)
    two = install(str(embedding(tmp_path / "bad.safetensors")), own, name="worse")
    three = install(str(tmp_path / "bad.safetensors"), own, kind="vae")

    assert (one.path, one.kind) == (own.data / "models/Lora/style.safetensors", "lora")
    assert two.path == own.data / "models/embeddings/worse.safetensors"
    assert three.path == own.data / "models/VAE/bad.safetensors"
    assert one.sha256 == hashlib.sha256((tmp_path / "style.safetensors").read_bytes()).hexdigest()
    assert (tmp_path / "style.safetensors").exists()  # the user's own file is kept


def test_a_diffusers_folder_is_installed(own: Settings, tmp_path: Path):
    folder = tmp_path / "pipeline"
    lora(folder / "unet/diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}')
    (folder / "unet/config.json").write_text("{}")

    done = install(str(folder), own)

    assert done.path == own.data / "models/Stable-diffusion/pipeline"
    assert (done.path / "unet/config.json").read_text() == "{}" and folder.exists()


def test_the_same_file_is_installed_once(own: Settings, tmp_path: Path):
    path = lora(tmp_path / "style.safetensors")

    assert not install(str(path), own).already
    assert install(str(path), own).already


def test_another_file_with_that_name_is_not_replaced(own: Settings, tmp_path: Path):
    install(str(lora(tmp_path / "style.safetensors", 1.0)), own)
    other = lora(tmp_path / "other/style.safetensors", 2.0)

    with pytest.raises(RequestError, match="choose another name with --name"):
        install(str(other), own)
    assert (own.data / "models/Lora/style.safetensors").read_bytes() != other.read_bytes()


def test_a_download_has_the_name_that_the_server_sends(own: Settings, site: Site, style: bytes):
    site.files["/download/7"] = style
    site.names["/download/7"] = "../../sty le.safetensors"

    done = install(site.url("/download/7?token=secret"), own)

    assert done.path == own.data / "models/Lora/sty le.safetensors" and done.path.read_bytes() == style
    assert "secret" not in done.source
    assert data_files(own) == ["models/Lora/sty le.safetensors"]


def test_a_broken_connection_is_resumed(own: Settings, site: Site, style: bytes, tmp_path: Path):
    site.files["/style.safetensors"] = style
    site.cut = [1000, 0, 2000]

    path, name = download(site.url("/style.safetensors"), tmp_path / "place", pause=0)

    assert path.read_bytes() == style and name == "style.safetensors"
    assert [sent_range for _, sent_range in site.requests] == ["", "bytes=1000-", "bytes=1000-", "bytes=3000-"]


def test_the_next_call_resumes_a_download(own: Settings, site: Site, style: bytes, tmp_path: Path):
    site.files["/style.safetensors"] = style
    site.cut = [1000, 0, 0, 0, 0]

    with pytest.raises(FileError, match="run the same command again to resume"):
        download(site.url("/style.safetensors"), tmp_path / "place", pause=0)
    site.cut = []
    path, _ = download(site.url("/style.safetensors"), tmp_path / "place", pause=0)

    assert path.read_bytes() == style and site.requests[-1] == ("/style.safetensors", "bytes=1000-")


def test_a_file_that_changed_on_the_server_is_downloaded_again(site: Site, style: bytes, tmp_path: Path):
    site.files["/style.safetensors"] = style
    site.cut = [1000, 0, 0, 0, 0]
    with pytest.raises(FileError):
        download(site.url("/style.safetensors"), tmp_path / "place", pause=0)
    site.cut, site.files["/style.safetensors"] = [], style[::-1]

    path, _ = download(site.url("/style.safetensors"), tmp_path / "place", pause=0)

    assert path.read_bytes() == style[::-1]


def test_without_range_support_the_whole_file_is_downloaded(site: Site, style: bytes, tmp_path: Path):
    site.files["/style.safetensors"], site.ranges, site.cut = style, False, [1000]

    path, _ = download(site.url("/style.safetensors"), tmp_path / "place", pause=0)

    assert path.read_bytes() == style


def test_a_killed_download_is_resumed(site: Site, style: bytes, tmp_path: Path):
    site.files["/style.safetensors"], site.cut = style, [5000]
    program = (
        "import os, sys, time; from pathlib import Path; from gouache.app import download as d\n"
        "d.time.sleep = lambda seconds: os.kill(os.getpid(), 9)\n"
        "d.download(sys.argv[1], Path(sys.argv[2]))"
    )
    ended = subprocess.run([sys.executable, "-c", program, site.url("/style.safetensors"), str(tmp_path / "place")])
    assert ended.returncode == -9

    path, _ = download(site.url("/style.safetensors"), tmp_path / "place")

    assert path.read_bytes() == style and site.requests[-1][1] == "bytes=5000-"


def test_the_token_is_sent_to_the_given_host_only(site: Site, style: bytes, tmp_path: Path):
    with serving(Site(files={"/x.safetensors": style})) as other:
        site.token, site.redirects["/x.safetensors"] = "mine", other.url("/x.safetensors")

        path, _ = download(site.url("/x.safetensors"), tmp_path / "place", token="mine", pause=0)

    assert path.read_bytes() == style and site.tokens == ["Bearer mine"] and other.tokens == [""]


def test_errors_are_one_line_with_what_to_do(own: Settings, site: Site):
    site.files["/page"], site.types["/page"] = b"<html>", "text/html; charset=utf-8"
    site.redirects["/away"] = "file:///etc/passwd"

    for source, reason in (
        (site.url("/absent"), "answers 404"),
        (site.url("/page"), "is a web page"),
        (site.url("/away"), "not allowed|not a web address"),
        ("ftp://127.0.0.1/x", "not a web address"),
        ("nothing-here", "not a Hugging Face repository"),
    ):
        with pytest.raises(RequestError, match=reason) as caught:
            install(source, own)
        assert "\n" not in str(caught.value)
    site.token = "needed"
    with pytest.raises(RequestError, match=r"requires a login.*--token"):
        install(site.url("/page"), own)


def test_a_file_with_a_wrong_hash_is_deleted(own: Settings, site: Site, style: bytes):
    site.files["/style.safetensors"] = style

    with pytest.raises(FileError, match=r"has the hash .* was expected"):
        install(site.url("/style.safetensors"), own, sha256="0" * 64)

    assert data_files(own) == []
    assert install(site.url("/style.safetensors"), own, sha256=hashlib.sha256(style).hexdigest().upper()).size


def test_a_download_is_kept_until_it_is_installed(own: Settings, site: Site, style: bytes, tmp_path: Path):
    """After an error about its name, or Ctrl-C while hashing, it is not downloaded again."""
    site.files["/style.safetensors"] = style
    install(str(lora(tmp_path / "style.safetensors", 2.0)), own)

    with pytest.raises(RequestError, match="--name"):
        install(site.url("/style.safetensors"), own)
    with pytest.raises(KeyboardInterrupt):
        install(site.url("/style.safetensors"), own, name="mine", on_work=interrupt)
    done = install(site.url("/style.safetensors"), own, name="mine")

    assert done.path.read_bytes() == style and len(site.requests) == 1
    assert data_files(own) == ["models/Lora/mine.safetensors", "models/Lora/style.safetensors"]


def interrupt(what: str, done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_hostile_file_is_not_installed(own: Settings, site: Site, tmp_path: Path):
    site.files["/model.ckpt"] = HOSTILE

    with pytest.raises(UnsafeFile, match=r"hostile.*posix\.system"):
        install(site.url("/model.ckpt"), own)

    assert data_files(own) == [] and not Path("proof").exists()


def test_a_web_page_with_the_name_of_a_model_is_refused(own: Settings, site: Site):
    site.files["/model.safetensors"] = b"<!DOCTYPE html><html>please log in</html>"

    with pytest.raises(FileError, match="not a model"):
        install(site.url("/model.safetensors"), own)

    assert data_files(own) == []


@pytest.mark.parametrize(
    "name",
    [
        "con", "CON", "nul.safetensors", "aux", "lpt1", "COM¹", "-rf", "--name", ".hidden", "a\u202eb",
        "a\x9bb", "a\x7f",
        "a\x1b[31m", "a\u200bb", "a\u2028b", "a\ud800", "x" * 230, "猫" * 70, "a ", " a", "a.", "..", ".", "a/b",
        "a\\b",
        "a:b", "a?", "",
    ],
)  # fmt: skip
def test_names_that_are_not_possible_everywhere_are_refused(own: Settings, tmp_path: Path, name: str):
    """By one rule for --name and for the file's own name."""
    source = lora(tmp_path / "style.safetensors")
    if name:
        with pytest.raises(RequestError, match="cannot be used as a file name") as caught:
            install(str(source), own, name=name)
        assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    try:
        named = source.rename(tmp_path / f"{name}.safetensors")
    except (OSError, UnicodeError):
        return
    if not name.endswith((" ", ".", "\\", "rs")) and name not in ("", "a/b", "--name"):
        with pytest.raises(RequestError, match="with --name"):
            install(str(named), own)
    assert data_files(own) == []


@pytest.mark.parametrize("name", ["猫 é", "style [20240131]", "v1.5", "a'b", "(x), {y}", "console", "comma.1"])
def test_other_names_are_kept(own: Settings, tmp_path: Path, name: str):
    done = install(str(lora(tmp_path / "style.safetensors")), own, name=name)

    assert done.path.name == f"{name}.safetensors"


def test_a_file_without_a_suffix_gets_that_of_its_format(own: Settings, tmp_path: Path):
    one = install(str(lora(tmp_path / "style.safetensors").rename(tmp_path / "v1.5")), own)

    assert one.path.name == "v1.5.safetensors"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_what_is_not_a_regular_file_is_refused_at_once(own: Settings, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "endless.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")

    for name in ("pipe", "endless", "loop"):
        with pytest.raises(FileError):
            install(str(tmp_path / f"{name}.safetensors"), own)


def pipeline(folder: Path) -> Path:
    lora(folder / "unet/diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}')
    (folder / "unet/config.json").write_text("{}")
    return folder


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_of_a_folder_only_the_files_that_a_model_needs_are_copied(own: Settings, tmp_path: Path):
    folder, private = pipeline(tmp_path / "pipeline"), tmp_path / "private"
    private.mkdir()
    (private / "secret.json").write_text("secret")
    (folder / "outside").symlink_to(private)
    (folder / "picture.png").write_bytes(b"x")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")

    done = install(str(folder), own)

    assert sorted(path.relative_to(done.path).as_posix() for path in done.path.rglob("*") if path.is_file()) == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_folder_whose_files_lead_outside_is_refused(own: Settings, tmp_path: Path):
    folder = pipeline(tmp_path / "pipeline")
    (tmp_path / "private.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "private.txt")

    with pytest.raises(FileError, match="is a link to a file outside of the folder"):
        install(str(folder), own)
    assert data_files(own) == []


def test_a_folder_of_the_hugging_face_cache_consists_of_links(own: Settings, tmp_path: Path):
    cache = tmp_path / "models--org--pipe"
    folder = pipeline(cache / "snapshots/aa")
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(cache / f"blobs/{number}")
        path.symlink_to(cache / f"blobs/{number}")

    done = install(str(folder), own)

    assert (done.path / "unet/config.json").read_text() == "{}" and not (done.path / "unet/config.json").is_symlink()


def test_a_folder_that_cannot_be_copied_leaves_nothing(own: Settings, tmp_path: Path, monkeypatch):
    folder, models = pipeline(tmp_path / "pipeline"), own.data / "models/Stable-diffusion"
    usage = shutil.disk_usage(tmp_path)

    def full(what: str, done: int, total: int) -> None:
        if what == "copying":
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FileError, match="the disk is full"):
        install(str(folder), own, on_work=full)
    assert list(models.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(FileError, match="100 bytes are free"):
        install(str(folder), own)
    assert list(models.iterdir()) == []


def test_a_models_folder_that_cannot_be_made_is_one_line(own: Settings, tmp_path: Path):
    own.data.mkdir()
    (own.data / "models").write_text("a file where the folder should be")

    for source in (lora(tmp_path / "style.safetensors"), pipeline(tmp_path / "pipeline")):
        with pytest.raises(FileError, match="cannot be installed") as caught:
            install(str(source), own)
        assert "\n" not in str(caught.value)


def test_without_a_network_a_repository_is_refused_at_once(tmp_path: Path):
    with serving(Site()) as site:
        closed = Site(address=site.address)  # after the block nothing answers there

    for source in ("org/hats", "org/hats/style.safetensors", f"{closed.address}/style.safetensors"):
        began = time.monotonic()
        ended = from_hub(closed, tmp_path / "data", source)

        assert ended.returncode == 2 and ended.stderr.startswith("error:") and ended.stderr.count("\n") == 1
        assert "cannot be downloaded" in ended.stderr and time.monotonic() - began < 20


@pytest.mark.parametrize(
    "answer", [b"[" * 100_000, b"{", b"[]", b'{"siblings": 5}', b'{"siblings": [{"rfilename": 5}]}']
)
def test_a_hub_that_answers_nonsense_is_one_line(site: Site, tmp_path: Path, answer: bytes):
    repository(site, "org/hats", {})
    site.files["/api/models/org/hats/revision/main"] = answer

    ended = from_hub(site, tmp_path / "data", "org/hats")

    assert ended.returncode == 2 and ended.stderr.startswith("error:") and ended.stderr.count("\n") == 1


def test_files_of_a_repository_that_lead_out_of_it_are_left_out(site: Site, style: bytes, tmp_path: Path):
    index = b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    bad = dict.fromkeys(("../up.json", "/etc/up.json", "a/../../up.json", "con/x.safetensors", "\x1b.json"), b"{}")
    files = {"model_index.json": index, "unet/diffusion_pytorch_model.safetensors": style, **bad}
    repository(site, "org/pipe", files)

    ended = from_hub(site, tmp_path / "data", "org/pipe")

    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.rglob("up.json")) and not list(tmp_path.rglob("con"))


def from_hub(site: Site, data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `gouache models install` with `site` as hub; in a new process, because HF_ENDPOINT is read on import."""
    environment = {
        **os.environ, "HF_ENDPOINT": site.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "GOUACHE_DATA": str(data), "GOUACHE_INDEX": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "gouache.cli.main", "models", "install", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_safetensors_file_of_a_repository_is_installed(site: Site, style: bytes, tmp_path: Path):
    repository(site, "org/hats", {"README.md": b"hi", "style.safetensors": style, "style.ckpt": HOSTILE})

    ended = from_hub(site, tmp_path / "data", "org/hats", "--json")

    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["source"] == "https://huggingface.co/org/hats/resolve/main/style.safetensors"
    assert Path(report["path"]).read_bytes() == style and Path(report["path"]).parent.name == "Lora"


def test_of_a_diffusers_repository_the_needed_files_are_installed(site: Site, style: bytes, tmp_path: Path):
    index = b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    weights = {
        "unet/diffusion_pytorch_model.safetensors": style, "unet/diffusion_pytorch_model.fp16.safetensors": style,
        "unet/diffusion_pytorch_model.bin": HOSTILE, "whole.ckpt": HOSTILE, "picture.png": b"x",
    }  # fmt: skip
    repository(site, "org/pipe", {"model_index.json": index, "unet/config.json": b"{}", **weights})

    ended = from_hub(site, tmp_path / "data", "org/pipe")

    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "data/models/Stable-diffusion/org--pipe"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_of_several_files_one_must_be_named(site: Site, style: bytes, tmp_path: Path):
    repository(site, "org/two", {"a.safetensors": style, "b.safetensors": style})

    both = from_hub(site, tmp_path / "data", "org/two")
    one = from_hub(site, tmp_path / "data", "org/two/b.safetensors")
    absent = from_hub(site, tmp_path / "data", "org/none")

    assert both.returncode == 2 and "name one as org/two/FILE: a.safetensors, b.safetensors" in both.stderr
    assert one.returncode == 0 and (tmp_path / "data/models/Lora/b.safetensors").exists()
    assert absent.returncode == 2 and absent.stderr.startswith("error:") and absent.stderr.count("\n") == 1
