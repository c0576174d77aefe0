"""Embeddings as runs: what is trained and kept, the files, templates, pivotal tuning, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

import gouache
from gouache.app.settings import Settings
from gouache.app.training import defaults, export, prepare
from gouache.app.training.folder import RunFolder
from gouache.errors import GouacheError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.generate.adapters import UsedFile
from gouache.generate.notes import adapter_notes
from gouache.generate.request import Request
from gouache.training import loop
from gouache.training.run_settings import RunSettings
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
WORD: dict[str, Any] = {"mode": "embedding", "data": {"trigger": "zorb"}}


def merged(*tables: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in tables:
        for name, value in each.items():
            found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


def networks(model: gouache.Model) -> list[tuple[str, dict[str, torch.Tensor]]]:
    parts = {"unet": model.unet, **model.text_encoders}  # the autoencoder is unloaded
    return [(name, part.state_dict()) for name, part in parts.items()]


def test_a_run_trains_nothing_but_the_vectors(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "zorb.safetensors", **WORD, train={"steps": 2})
    with prepare.prepared(
        chosen, RunFolder(tmp_path / "run"), settings, on_note=[].append, on_work=lambda *_: None
    ) as ready:
        table = ready.model.text_encoders["text_encoder"].text_model.embeddings.token_embedding.weight
        start = ready.target.networks["embedding"].state_dict()["text_encoder"].clone()
        trained = [name for group in ready.objective.parameter_groups() for name in group.parameters]
        ready.objective.losses(ready.batches(0), 0)["loss"].backward()
        assert trained == ["embedding.text_encoder"] and table.grad is None
        assert all(each.grad is None for each in ready.model.unet.parameters())
        used = ready.model
        weights = {f"{name}.{key}": each.clone() for name, network in networks(used) for key, each in network.items()}
        loop.train(ready.objective, ready.batches, chosen.train, tmp_path / "run")
        now = {f"{name}.{key}": each for name, network in networks(used) for key, each in network.items()}
        vectors = ready.target.networks["embedding"].state_dict()["text_encoder"]
        assert not torch.equal(vectors, start)
    assert weights.keys() == now.keys() and all(torch.equal(weights[name], now[name]) for name in now)
    assert "zorb" not in used.embeddings  # as the model was


def test_diffusers_gives_the_exported_word_the_same_conditioning(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    """In a file of A1111 and in one of kohya's scripts, read by another program."""
    model, output = narrow("sd1").file, tmp_path / "zorb.safetensors"
    run(settings_of(model, pictures, output, **merged(WORD, {"embedding": {"vectors": 3}})), tmp_path / "r", settings)
    export.export(RunFolder(tmp_path / "r"), tmp_path / "zorb.pt", settings)
    notes: list[str] = []
    export.export(RunFolder(tmp_path / "r"), tmp_path / "zorbx.pt", settings, on_note=notes.append)
    assert notes[-1] == "programs know an embedding by the name of its file: prompts say zorbx"
    vectors = load_file(output)["emb_params"]
    stored = torch.load(tmp_path / "zorb.pt", weights_only=True)
    assert torch.equal(stored["string_to_param"]["*"], vectors) and stored["step"] == 4

    found = identify(open_model(output))
    assert found.family.value is not None and found.family.value.name == "sd1"  # which no width shows
    assert found.kind.value == "embedding"
    assert {open_model(output).metadata[f"ss_{part}_lr"] for part in ("unet", "text_encoder")} == {"0.0"}

    loaded = gouache.load(model, device="cpu", dtype="fp32", settings=settings)
    pipe = copy.deepcopy(narrow("sd1").pipeline)  # which is changed
    tokenizer: CLIPTokenizer = pipe.tokenizer
    encoder: CLIPTextModel = pipe.text_encoder
    pipe.load_textual_inversion(str(tmp_path / "zorb.pt"), token="zorb")
    prompt = pipe.maybe_convert_prompt("a photo of zorb, red", tokenizer)
    ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = encoder(ids).last_hidden_state
        loaded.embeddings.add("zorb", {"text_encoder": vectors})
        ours = loaded.encode_prompts(["a photo of zorb, red"], size=(64, 64)).context
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_lora_and_its_word_are_one_file(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    model, output = narrow("sdxl").file, tmp_path / "both.safetensors"
    both = settings_of(
        model, pictures, output, data={"trigger": "zorb"}, embedding={"vectors": 2}, adapter={"rank": 2},
        train={"steps": 2},
    )  # fmt: skip
    run(both, tmp_path / "run", settings)
    stored = load_file(output)
    widths = {name: tuple(each.shape) for name, each in stored.items() if name.startswith("bundle_emb.")}
    loaded = gouache.load(model, device="cpu", dtype="fp32", settings=settings)
    encoders = loaded.text_encoders
    assert widths == {
        f"bundle_emb.zorb.{key}": (2, encoder.spec.width)
        for key, encoder in zip(("clip_l", "clip_g"), encoders.values())
    }
    assert any(name.startswith("lora_unet_") for name in stored)
    assert "with 1 bundled embedding: zorb" in identify(open_model(output)).kind.evidence
    attached = loaded.attach(output)
    used = UsedFile("lora", output, "", "", attached)
    assert str(attached).endswith("with the word zorb")
    said = "\n".join(adapter_notes(Request(prompt="red"), [used]))
    assert "no prompt contains zorb" in said
    assert not list(adapter_notes(Request(prompt="a zorb"), [used]))
    trained = load_file(tmp_path / "run" / "step-00000002" / "weights.safetensors")
    assert {"embedding.text_encoder", "embedding.text_encoder_2"} < set(trained)
    with pytest.raises(GouacheError, match="cannot hold an embedding"):
        export.export(RunFolder(tmp_path / "run"), tmp_path / "m.safetensors", settings, form="full")
    with pytest.raises(GouacheError, match="names: peft has no embeddings, and this LoRA has one; use kohya"):
        export.export(RunFolder(tmp_path / "run"), tmp_path / "m", settings, names="peft")


@pytest.mark.parametrize("both", [False, True])
def test_a_run_goes_on_from_the_vectors_of_a_file(
    both: bool, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    """Those of an embedding, or of the word in a LoRA's file."""
    usual = merged(WORD, {"embedding": {"vectors": 2}, "train": {"steps": 1}})
    usual |= {"mode": "lora", "adapter": {"rank": 2}} if both else {}
    first = tmp_path / "first.safetensors"
    run(settings_of(narrow("sd1").file, pictures, first, **usual), tmp_path / "a", settings)
    again = merged(usual, {"adapter": {"start": str(first)}, "embedding": {"vectors": 2 if both else None}})
    for own, message in (
        ({"vectors": 1}, r"embedding\.vectors: is 1; expected 2, as the file of adapter\.start has it"),
        ({"init_word": "ball"}, r"embedding\.init_word: has no effect on vectors of a file"),
    ):
        other = settings_of(
            narrow("sd1").file, pictures, tmp_path / "c.safetensors", **merged(again, {"embedding": own})
        )
        with pytest.raises(GouacheError, match=message):
            prepare.check_model(other, settings)
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "b.safetensors", **again)
    with prepare.prepared(
        chosen, RunFolder(tmp_path / "b"), settings, on_note=[].append, on_work=lambda *_: None
    ) as ready:
        trained = {name: each for group in ready.target.groups() for name, each in group.parameters.items()}
        stored = load_file(first)["bundle_emb.zorb.emb_params" if both else "emb_params"]
        assert torch.equal(trained["embedding.text_encoder"], stored)


def test_templates_are_the_captions(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a drawing of [name], [filewords]\n\n[name]\n")
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "glim.safetensors",
        **merged(WORD, {"data": {"trigger": "glim", "template": str(lines)}}),
    )  # fmt: skip
    with prepare.prepared(
        chosen, RunFolder(tmp_path / "run"), settings, on_note=[].append, on_work=lambda *_: None
    ) as ready:
        seen = {caption for number in range(20) for caption in ready.batches(number).captions}
        fixed = {caption for batch in cast(Any, ready.validation).probe for caption in batch.captions}
    texts = {path.read_text() for path in pictures.glob("*.txt")}
    assert seen == {"glim", *(f"a drawing of glim, {text}" for text in texts)}
    assert fixed <= {f"a drawing of glim, {text}" for text in texts}  # the validation's do not vary


def test_batches_without_the_word_change_nothing(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    """As those of which all captions are dropped."""
    output = tmp_path / "zorb.safetensors"
    chosen = settings_of(
        narrow("sd1").file, pictures, output, **merged(WORD, {"data": {"caption_dropout": 1.0}}), train={"steps": 2}
    )
    run(chosen, tmp_path / "run", settings)
    start = gouache.load(narrow("sd1").file, device="cpu", dtype="fp32", settings=settings)
    star = start.text_encoders["text_encoder"].embed(torch.tensor([start.tokenizer.encode("*")]))[0]
    assert torch.equal(load_file(output)["emb_params"], star)


def choose(pictures: Path, *overrides: str, mode: str = "embedding", settings: Settings, **given: Any) -> RunSettings:
    usual: dict[str, Any] = {"output": None, "trigger": "zorb", "class_word": "", "steps": None}
    return defaults.choose(mode, str(pictures), "mini", overrides=list(overrides), settings=settings,
                           **{**usual, **given})  # fmt: skip


def test_chosen_settings(pictures: Path, settings: Settings):
    chosen = choose(pictures, settings=settings)
    assert (chosen.output, chosen.embedding.vectors, chosen.data.template) == ("zorb.safetensors", 1, "")
    assert chosen.train.learning_rate == 2.5e-2 and chosen.train.ema_decay == 0
    assert choose(pictures, settings=settings, trigger="a/b").output == "a-b.safetensors"
    assert choose(pictures, "start=zorb.pt", settings=settings).embedding.vectors is None
    assert choose(pictures, "vectors=4", mode="lora", settings=settings).embedding.rate == 10
    kohya = choose(pictures, "token_string=glim", "num_vectors_per_token=3", "use_style_template", settings=settings)
    assert (kohya.data.trigger, kohya.embedding.vectors, kohya.data.template) == ("glim", 3, "style")
    for text in pictures.glob("*.txt"):
        text.unlink()
    assert choose(pictures, settings=settings).data.template == "subject"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"data": {"trigger": ""}}, "trigger: is missing"),
        ({"embedding": {"vectors": 76}}, "vectors: is 76; expected 1 to 75"),
        ({"adapter": {"rank": 8}}, "adapter.rank: has no effect on the mode embedding"),
        ({"parts": {"text_encoder": True}}, "parts.text_encoder: has no effect on the mode embedding"),
        ({"data": {"template": "object"}}, "data.template: 'object' is not known; use subject, style"),
        ({"output": "zorb.bin"}, "does not end in .safetensors or .pt"),
        ({"mode": "finetune", "adapter": {"form": "none"}, "embedding": {"vectors": 1}}, "embedding.vectors: has no"),
        ({"embedding": {"vectors": 0}}, "embedding.vectors: is 0; expected 1 to 75"),
        ({"mode": "lora", "embedding": {"init_word": "a"}}, "init_word: has no effect without embedding.vectors"),
        ({"mode": "lora", "embedding": {"rate": 2}}, "embedding.rate: has no effect without embedding.vectors"),
        ({"data": {"trigger": "(zorb:1.2)"}}, r"data\.trigger: is '\(zorb:1\.2\)'; expected a word without"),
        (
            {"mode": "lora", "data": {"trigger": "(z"}, "embedding": {"vectors": 1}},
            r"data\.trigger: is '\(z'; expected",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    tables: dict[str, Any], message: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    with pytest.raises(GouacheError, match=message) as caught:
        tables = merged(WORD, tables)
        output = tmp_path / tables.pop("output", "zorb.safetensors")
        chosen = settings_of(narrow("sd1").file, pictures, output, **tables)
        run(chosen, tmp_path / "run", settings)
    assert "\n" not in str(caught.value)
