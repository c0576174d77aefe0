"""`inspect`: details of each kind of file, damage, fingerprints and advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gouache.files.open import open_model
from gouache.training.state import State, save
from gouache.workshop.advice import compare
from gouache.workshop.inspect import Report, files_of, report
from gouache.workshop.lora.extract import extract
from gouache.workshop.lora.factors import Size
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]


def details(found: Report) -> dict[str, str]:
    return {detail.name: detail.value for detail in found.details}


def test_a_lora_report_has_rank_training_and_trigger_words(narrow: Narrows, tmp_path: Path):
    def tune(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "attn2" in name and tensors[name].ndim == 2]:
            tensors[name] = tensors[name] + 1

    tuned = altered(narrow("sd1").file, tmp_path / "tuned.safetensors", tune)
    extract(tuned, narrow("sd1").file, tmp_path / "plain.safetensors", Size(2, energy=0.5))
    tags = {"10_fox": {"fox": 30, "tree": 5}, "5_more": {"fox": 2}}
    metadata = {"ss_tag_frequency": json.dumps(tags), "modelspec.trigger_phrase": "a fxo fox", "ss_steps": "1200",
                "ss_base_model_version": "sd_v1", "ss_network_alpha": "4"}  # fmt: skip
    save_file(load_file(tmp_path / "plain.safetensors"), tmp_path / "lora.safetensors", metadata)

    found = details(report(tmp_path / "lora.safetensors"))

    assert found["rank"].startswith("1 (") and found["alpha"] == "4"
    assert found["trigger words"] == "a fxo fox"
    assert found["captions"] == "fox (32), tree (5)"
    assert found["steps"] == "1200" and found["base model"] == "sd_v1"


def test_malformed_tag_metadata_is_ignored(tmp_path: Path):
    weights = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 8),
               "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(8, 2)}  # fmt: skip
    for number, text in enumerate(("[" * 100_000, "[]", '{"a": {"b": "c"}}', "not json")):
        save_file(weights, tmp_path / f"{number}.safetensors", {"ss_tag_frequency": text})

        assert "captions" not in details(report(tmp_path / f"{number}.safetensors"))


def test_an_embedding_report_has_vectors_and_trigger_word(tmp_path: Path):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(4, 768)}, "name": "inner", "step": 9}
    torch.save(content, tmp_path / "cat.pt")
    save_file({"<moon>": torch.zeros(2, 768)}, tmp_path / "d.safetensors")

    found, other = report(tmp_path / "cat.pt"), report(tmp_path / "d.safetensors")

    assert details(found) == {"vectors": "4", "trigger word": "cat", "steps": "9"}
    assert details(other)["trigger word"] == "<moon>" and details(other)["vectors"] == "2"
    assert found.advice == ("it fits Stable Diffusion 1 models",)


def test_a_hypernetwork_report_has_its_layers(tmp_path: Path):
    half = nn.Sequential(nn.Linear(768, 1536), nn.ReLU(), nn.Linear(1536, 768))
    halves = ({f"linear.{key}": value for key, value in half.state_dict().items()},) * 2
    torch.save({768: halves, "step": 5000, "name": "style", "activation_func": "relu"}, tmp_path / "style.pt")

    found = details(report(tmp_path / "style.pt"))

    assert (found["widths"], found["layers"]) == ("768", "[1, 2.0, 1.0]")
    assert (found["activation"], found["steps"], found["activates its output"]) == ("relu", "5000", "True")


def training(weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "state_dict": weights, "epoch": 3, "global_step": 470000, "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4]}], "callbacks": {"best": {"best_model_score": 0.25}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01), "AdamW"),
        (lambda p: torch.optim.Adam(p, lr=1e-4), "Adam or AdamW"),
        (lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9), "SGD with momentum"),
        (lambda p: torch.optim.SGD(p, lr=1e-4), "optimizer without moments"),
    ],
)
def test_a_training_checkpoint_report_has_progress_optimizer_and_metrics(
    narrow: Narrows, make: Any, kind: str, tmp_path: Path
):
    model = nn.Linear(30, 20)
    optimizer = make(model.parameters())
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    torch.save(training(load_file(narrow("sd1").file), optimizer), tmp_path / "last.ckpt")

    found = details(report(tmp_path / "last.ckpt"))

    assert found["progress"] == "epoch 3, global_step 470000"
    assert found["optimizer"].startswith(kind) and found["learning rate"] == "0.0001"
    assert found["metrics"] == "best_model_score 0.25"


def test_a_checkpoint_folder_of_gouaches_trainer_is_recognised(tmp_path: Path):
    state = State({"weights": {"w": torch.zeros(3)}, "optimizer": {"w.exp_avg": torch.zeros(3)}},
                  {"step": 40, "best": 0.5, "settings": {"steps": 100, "learning_rate": 1e-3}})  # fmt: skip
    folder = save(tmp_path, state, keep=2)

    found = report(folder)

    assert list(files_of(folder)) == [folder]
    assert [fact.value for fact in found.facts] == ["training checkpoint"]
    assert details(found)["progress"] == "step 40 of 100" and details(found)["optimizer"].startswith("AdamW")


def test_damaged_tensors_are_listed(narrow: Narrows, tmp_path: Path):
    unet, ids = "model.diffusion_model.", "cond_stage_model.transformer.text_model.embeddings.position_ids"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{unet}out.2.weight"][0, 0] = float("nan")
        tensors[f"{unet}out.0.bias"][3] = float("inf")
        tensors[f"{unet}middle_block.0.in_layers.2.weight"].zero_()
        tensors[ids] = torch.arange(77)[None].half() * 0.999

    file = altered(narrow("sd1").file, tmp_path / "m.safetensors", damage)

    found, intact = report(file, deep=True), report(narrow("sd1").file, deep=True)

    assert intact.faults == ()
    assert {
        (fault.tensor, fault.what.partition(",")[0].partition(":")[0], fault.serious) for fault in found.faults or ()
    } == {
        (f"{unet}out.2.weight", "has 9 of 1152 values NaN", True),
        (f"{unet}out.0.bias", "has 1 of 32 values infinite", True),
        (f"{unet}middle_block.0.in_layers.2.weight", "is all zeros", True),
        (ids, "is not 0", False),
    }
    assert found.hashes is not None and report(file).faults is None


def test_a_component_has_the_same_fingerprint_in_every_layout(narrow: Narrows, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["first_stage_model.quant_conv.bias"] += 1

    other = altered(narrow("sd2").file, tmp_path / "m.safetensors", change)

    prints = [
        {part.name: part.fingerprint for part in report(path, deep=True).components}
        for path in (narrow("sd2").file, narrow("sd2").folder, other)
    ]

    assert prints[0] == prints[1] and len(set(prints[0].values())) == 3
    assert {name for name in prints[0] if prints[0][name] != prints[2][name]} == {"vae"}


def test_unknown_names_are_listed_with_the_most_similar_known_name(narrow: Narrows, tmp_path: Path):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weigth"
    file = altered(narrow("sd1").file, tmp_path / "m.safetensors", lambda t: t.update({name: torch.zeros(1)}))

    found = report(file, keys=True)

    assert found.unknown == {name: name.replace("weigth", "weight")}
    assert found.keys is not None and found.keys[name] == "F32 [1]" and len(found.keys) == found.count


def averages(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
        tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1


def test_several_models_are_compared_for_painting_and_fine_tuning(narrow: Narrows, tmp_path: Path):
    from gouache.workshop.prune import prune

    full = altered(narrow("sd1").file, tmp_path / "pruned.safetensors", averages)
    prune(full, tmp_path / "emaonly.safetensors", dtype="fp16")
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(5)}
    altered(tmp_path / "emaonly.safetensors", tmp_path / "pruned-emaonly.safetensors", lambda t: t.update(counters))
    (tmp_path / "emaonly.safetensors").unlink()

    paths = list(files_of(tmp_path))
    reports = [report(path) for path in paths]
    lines = compare([(each.file, each.found) for each in reports if each.file and each.found])

    assert [path.name for path in paths] == ["pruned-emaonly.safetensors", "pruned.safetensors"]
    assert lines[0].startswith("best for painting: pruned-emaonly.safetensors")
    assert lines[1].startswith("best for fine-tuning: pruned.safetensors")
    assert any("its EMA weights are better" in hint for hint in reports[1].advice)
    assert any("its weights are EMA weights" in hint for hint in reports[0].advice)


def test_advice_for_a_model_without_a_vae_says_which_vae_fits(narrow: Narrows, tmp_path: Path):
    def strip(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    file = altered(narrow("sdxl").file, tmp_path / "m.safetensors", strip)

    hints = report(file).advice

    assert any("cannot paint because its vae is missing; use an SDXL VAE" in hint for hint in hints)
    assert "vae" not in {part.name for part in report(file).components} and open_model(file)


def test_only_models_of_the_released_size_may_need_clip_skip_2(narrow: Narrows):
    """Models based on NovelAI's have the released text encoder; narrow ones are trained without clip skip."""
    advice = report(narrow("sd1").file).advice

    assert "use clip skip 1" in advice and not any("NovelAI" in line for line in advice)
