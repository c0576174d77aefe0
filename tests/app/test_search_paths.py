"""The folders that are searched: installations of A1111 and ComfyUI, extra_model_paths.yaml, the Hugging Face cache."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gouache.app import folders
from gouache.app.search_paths import candidates, extra_paths, search_folders
from gouache.app.settings import Settings, read
from gouache.errors import FileError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(root: Path, settings: Settings) -> dict[str, str]:
    """Path below `root` -> category of its folder."""
    every = candidates(replace(settings, models=(root,)))
    return {each.path.relative_to(root).as_posix(): each.category for each in every}


def test_of_a_web_ui_only_the_folders_of_models_are_searched(settings: Settings, tmp_path: Path):
    touch(
        tmp_path / "models/Stable-diffusion/anime/dream.safetensors",
        tmp_path / "models/VAE/mse.ckpt",
        tmp_path / "models/Lora/style.safetensors",
        tmp_path / "models/hypernetworks/old.pt",
        tmp_path / "models/ESRGAN/4x.pth",
        tmp_path / "embeddings/bad.pt",
        tmp_path / "embeddings/drawn.png",
        tmp_path / "embeddings/bad.preview.png",
        tmp_path / "venv/lib/torch/something.pt",
        tmp_path / "models/Stable-diffusion/dream.png",
        tmp_path / "models/Stable-diffusion/notes.txt",
    )

    assert found(tmp_path, settings) == {
        "models/Stable-diffusion/anime/dream.safetensors": "checkpoint",
        "models/VAE/mse.ckpt": "vae",
        "models/Lora/style.safetensors": "lora",
        "models/hypernetworks/old.pt": "hypernetwork",
        "models/ESRGAN/4x.pth": "upscaler",
        "embeddings/bad.pt": "embedding",
        "embeddings/drawn.png": "embedding",
    }


def test_comfyui_with_its_yaml(settings: Settings, tmp_path: Path):
    comfy, other = tmp_path / "comfy", tmp_path / "other"
    touch(
        comfy / "models/checkpoints/a.safetensors",
        comfy / "models/loras/b.safetensors",
        comfy / "models/text_encoders/t5.safetensors",
        comfy / "output/c.pt",
        other / "lora one/d.safetensors",
        other / "lycoris/e.safetensors",
    )
    (comfy / "extra_model_paths.yaml").write_text(
        f"a111:\n  base_path: {other}\n  loras: |\n    lora one\n    lycoris\n  custom_nodes: nodes\n"
    )

    every = {each.path.name: each.category for each in candidates(replace(settings, models=(comfy,)))}

    assert every == {
        "a.safetensors": "checkpoint",
        "b.safetensors": "lora",
        "t5.safetensors": "text encoder",
        "d.safetensors": "lora",
        "e.safetensors": "lora",
    }


def test_extra_model_paths_are_read_as_in_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELS", str(tmp_path / "models"))
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text(
        "one:\n  base_path: here\n  checkpoints: sd\n  vae: |\n    a\n    b\n"
        "two:\n  base_path: $MODELS\n  is_default: true\n  checkpoints: sd\n  unet: /absolute\n"
    )

    found = [(each.path, each.category) for each in extra_paths(path)]

    assert found == [
        (tmp_path / "models/sd", "checkpoint"),  # the default section comes first
        (Path("/absolute"), "unet"),
        (tmp_path / "here/sd", "checkpoint"),  # relative to the YAML file
        (tmp_path / "here/a", "vae"),
        (tmp_path / "here/b", "vae"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b", "a list"),
        ("!!python/object/apply:os.system [x]", "YAML"),
        ("[" * 3000, "nested more than 64 deep"),
        ("s: {base_path: 1" + "0" * 5000 + "}", "is not YAML"),
        ("s: 2020-99-99", "is not YAML"),
        ('s: {base_path: "\\0", loras: x}', "base_path: is not a path"),
        ("s: {base_path: ~nobody_zz/x, loras: x}", "unknown user"),
        ("s: {base_path: [a], loras: x}", "not a path"),
        ("a: &a [x,x,x]\nb: {base_path: *a, loras: x}", "aliases"),
    ],
)
def test_an_invalid_yaml_is_refused_in_one_line(text: str, reason: str, tmp_path: Path):
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text(text)

    with pytest.raises(FileError) as caught:
        search_folders(path)

    assert str(caught.value).startswith(str(path)) and reason in str(caught.value) and "\n" not in str(caught.value)


def test_any_other_folder_is_searched_recursively(settings: Settings, tmp_path: Path):
    touch(tmp_path / "one.safetensors", tmp_path / "Lora/two.safetensors", tmp_path / "new/deep/three.ckpt")
    touch(tmp_path / ".trash/four.safetensors")

    assert found(tmp_path, settings) == {
        "Lora/two.safetensors": "lora", "one.safetensors": "", "new/deep/three.ckpt": "",
    }  # fmt: skip


def test_models_in_the_hugging_face_cache_are_named_by_repository(settings: Settings, tmp_path: Path):
    repository = tmp_path / "hub/models--org--one"
    old, new = repository / "snapshots/aaaa", repository / "snapshots/bbbb"
    touch(old / "old.safetensors", new / "model_index.json", new / "unet/diffusion_pytorch_model.safetensors")
    touch(tmp_path / "hub/models--org--two/snapshots/cccc/sub/file.safetensors")
    touch(tmp_path / "hub/models--org--empty/refs/main")
    touch(tmp_path / "hub/datasets--org--three/snapshots/dddd/x.bin")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("bbbb")

    every = {each.names[0]: each for each in candidates(replace(settings, hub=tmp_path / "hub"))}

    assert every["org/one"].path == new
    assert every["org/two/sub/file"].path.name == "file.safetensors" and "file" in every["org/two/sub/file"].names
    assert len(every) == 2


def test_the_hub_cache_is_found_by_environment_variables(home: Path):
    assert read({}).hub == Path("~/.cache").expanduser() / "huggingface/hub"
    assert read({"XDG_CACHE_HOME": "/c"}).hub == Path("/c/huggingface/hub")
    assert read({"HF_HOME": "/h", "XDG_CACHE_HOME": "/c"}).hub == Path("/h/hub")
    assert read({"HF_HUB_CACHE": "/x", "HF_HOME": "/h"}).hub == Path("/x")


def test_added_folders_are_stored_and_come_before_the_default_one(tmp_path: Path):
    one, data = tmp_path / "one", tmp_path / "data"
    one.mkdir()

    assert folders.add(data, one) and not folders.add(data, one)
    assert read({"GOUACHE_DATA": str(data)}).models == (one, data / "models")
    assert folders.remove(data, one) and not folders.remove(data, one)
    assert read({"GOUACHE_DATA": str(data)}).models == (data / "models",)


def test_a_missing_folder_is_not_added(tmp_path: Path):
    with pytest.raises(FileError, match="does not exist"):
        folders.add(tmp_path, tmp_path / "absent")


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]"])
def test_a_damaged_list_of_folders_is_refused(content: str, tmp_path: Path):
    (tmp_path / "folders.json").write_text(content)

    with pytest.raises(FileError, match=r"folders\.json.*delete it"):
        folders.added(tmp_path)


def test_deep_folders_and_links_in_loops_end(settings: Settings, tmp_path: Path):
    deep = tmp_path / "deep"
    for _ in range(400):
        deep = deep / "d"
    deep.mkdir(parents=True)
    touch(tmp_path / "a.safetensors", tmp_path / "deep/b.safetensors", deep / "c.safetensors")
    (tmp_path / "self.safetensors").symlink_to("self.safetensors")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")

    assert set(found(tmp_path, settings)) == {"a.safetensors", "deep/b.safetensors", "self.safetensors"}


def test_a_folder_to_which_several_links_lead_is_searched_once(settings: Settings, tmp_path: Path):
    webui, other = tmp_path / "webui", tmp_path / "other"
    touch(webui / "models/Stable-diffusion/a.ckpt", webui / "models/Lora/b.safetensors", other / "c.safetensors")
    (webui / "models/Stable-diffusion/all").symlink_to("..")
    for name in ("first", "second"):
        (webui / "models/Lora" / name).symlink_to(other)

    every = list(candidates(replace(settings, models=(webui, webui / "models/Lora", other))))

    assert [(each.path.name, each.category) for each in every] == [
        ("a.ckpt", "checkpoint"), ("b.safetensors", "lora"), ("c.safetensors", "lora"),
    ]  # fmt: skip
    assert "Lora/first/c" in every[2].names


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_what_is_wrong_in_the_hugging_face_cache_is_passed_over(settings: Settings, tmp_path: Path):
    hub = tmp_path / "hub"
    for name in ("pipe", "endless", "outside", "deep"):
        touch(hub / f"models--org--{name}/snapshots/aa/{name}.safetensors")
        (hub / f"models--org--{name}/refs").mkdir()
    touch(tmp_path / "private/secret.safetensors")
    os.mkfifo(hub / "models--org--pipe/refs/main")
    (hub / "models--org--endless/refs/main").symlink_to("/dev/zero")
    (hub / "models--org--outside/refs/main").write_text("../../../private")
    (hub / "models--org--deep/refs/main").write_text("x" * 5000)

    every = [each.path.name for each in candidates(replace(settings, hub=hub))]

    assert every == [f"{name}.safetensors" for name in ("deep", "endless", "outside", "pipe")]
