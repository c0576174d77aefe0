"""python -m recipes.adapters.fit FOLDER [--only night|zorblax|rosy] [--steps N] [--model mini]

Trains three adapters for the embedded model and writes them in the most common formats: `night`, a LoRA of a style
(kohya's names); `zorblax`, an embedding of a character that the model does not know (A1111's `.pt`); `rosy`, a
hypernetwork (A1111's `.pt`) that paints pink backgrounds. Some minutes each on two cores, with the objective of the
model's pretraining. The model's weights do not change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn

import gouache
from gouache.diffusion.conditioning import Conditioning
from gouache.images import pixels
from gouache.training import loop
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.objective import Group, step_generator
from gouache.training.settings import Settings
from gouache.training.step import Batches
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.options import AdapterOptions
from recipes.adapters.pictures import CHARACTER, character, night, rosy
from recipes.mini.command import print_progress, run_command, with_progress
from recipes.mini.dataset import sample
from recipes.mini.names import Thing, load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import UNIFORM, Scene

SEED, BATCH, SIZE, RANK = 11, 8, 128, 8
STEPS = {"night": 300, "zorblax": 200, "rosy": 400}
SCENES = 384  # their latents are computed once
# Common things more often, as in the model's training.
SINGLE_THING = replace(UNIFORM, count_weights=(1.0, 0.0, 0.0), tinted=0.0, common_weight=6)


@dataclass(frozen=True)
class Run:
    """What a training run works with: a model, the output folder, numbers of steps and scenes, things, a font."""

    name: str
    model: gouache.Model
    folder: Path
    steps: int
    scenes: int
    things: Sequence[Thing]
    glyphs: Glyphs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in a usual font folder")
    options = parser.parse_args(arguments)
    return run_command(lambda: fit_adapters(options))


def fit_adapters(options: argparse.Namespace) -> None:
    things, glyphs = load_things(), Glyphs(options.font)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in (options.only,) if options.only else tuple(STEPS):
        model = gouache.load(options.model, device="cpu", dtype="fp32")
        fit = {"night": fit_lora, "zorblax": fit_embedding, "rosy": fit_hypernetwork}[name]
        print(
            fit(Run(options.model, model, options.folder, options.steps or STEPS[name], options.scenes, things, glyphs))
        )


def fit_lora(run: Run) -> Path:
    """A LoRA on every attention and feed-forward layer and every convolution of the U-Net."""
    model = run.model
    latents, contexts = encoded_scenes(run, lambda scene: night(render(scene, run.glyphs, SIZE)))
    target = AdapterTarget(
        model, AdapterOptions(form="locon", rank=RANK, alpha=RANK, conv_rank=RANK, conv_alpha=RANK), seed=SEED
    )
    objective = Denoising(model.denoiser, target.networks, unconditional(model), SEED, target=target, base=run.name)
    weights = optimise(run, "night", objective, encoded_batches(latents, contexts), 6e-4)
    path = run.folder / "night.safetensors"
    title = {"modelspec.title": "night", "modelspec.description": "scenes by moonlight, for the embedded model"}
    target.export(weights, path, form="adapter", names="kohya", metadata=title, dtype="fp16", overwrite=True)
    return path


def fit_embedding(run: Run) -> Path:
    """A vector for a new word, initialised with that of the most similar thing: grapes, round and violet."""
    model = run.model
    encoder = model.text_encoders["text_encoder"]
    tokens = model.tokenizer.encode("grapes")
    vectors = nn.Parameter(encoder.embed(torch.tensor(tokens)).detach().clone())
    rng = Random(SEED)
    examples = [character(rng, SIZE) for _ in range(run.scenes)]
    latents = encode_pictures(model, [picture for picture, _ in examples])
    captions = [caption for _, caption in examples]

    model.embeddings.add(CHARACTER, {"text_encoder": vectors})

    def batch(number: int) -> Batch:
        rows = rows_of(number, len(latents))
        return Batch(latents[rows], captions=tuple(captions[row] for row in rows))

    objective = Denoising(
        model.denoiser, {"text_encoder": encoder}, unconditional(model), SEED, 0.0, base=run.name,
        groups=(Group({CHARACTER: vectors}, decay=False),), encode=lambda texts, _: encode_captions(model, texts),
    )  # fmt: skip
    optimise(run, CHARACTER, objective, batch, 5e-4)
    path = run.folder / f"{CHARACTER}.pt"
    record = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors.detach()}, "name": CHARACTER}
    torch.save({**record, "step": run.steps, "sd_checkpoint_name": "mini"}, path)
    return path


def fit_hypernetwork(run: Run) -> Path:
    """A pair of small networks, for keys and values, per width of the U-Net's attention inputs."""
    model = run.model
    torch.manual_seed(SEED)
    widths = sorted({layer.in_features for name, layer in model.unet.named_modules()
                     if isinstance(layer, nn.Linear) and name.endswith((".to_k", ".to_v"))})  # fmt: skip
    pairs = {width: nn.ModuleList(_mlp(width) for _ in range(2)) for width in widths}
    for name, layer in model.unet.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith((".to_k", ".to_v")):
            mlp = pairs[layer.in_features][int(name.endswith(".to_v"))]
            layer.register_forward_pre_hook(lambda _, inputs, mlp=mlp: (inputs[0] + mlp(inputs[0]),))
    latents, contexts = encoded_scenes(run, lambda scene: render(rosy(scene), run.glyphs, SIZE))
    networks = {str(width): pair for width, pair in pairs.items()}
    objective = Denoising(model.denoiser, networks, unconditional(model), SEED, base=run.name)
    optimise(run, "rosy", objective, encoded_batches(latents, contexts), 2e-3)
    record = {
        width: tuple({f"linear.{name}": value for name, value in mlp.state_dict().items()} for mlp in pair)
        for width, pair in pairs.items()
    }
    path = run.folder / "rosy.pt"
    flags = {"layer_structure": [1, 2, 1], "activation_func": "relu", "is_layer_norm": False, "activate_output": False}
    torch.save({**record, "step": run.steps, "name": "rosy", **flags, "sd_checkpoint_name": "mini"}, path)
    return path


def _mlp(width: int) -> nn.Sequential:
    mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
    nn.init.zeros_(mlp[2].weight)  # it changes nothing at first
    nn.init.zeros_(mlp[2].bias)
    return mlp


def encoded_scenes(run: Run, make_picture: Callable[[Scene], Image.Image]) -> tuple[Tensor, Tensor]:
    """(latents, contexts) of scenes as the embedded model's, with pictures from `make_picture`."""
    samples = [sample(SEED, index, run.things, SINGLE_THING) for index in range(run.scenes)]
    latents = encode_pictures(run.model, [make_picture(each.scene) for each in samples])
    with torch.no_grad():
        contexts = [encode_captions(run.model, [each.caption]).context for each in samples]
    return latents, torch.cat(contexts)


@torch.no_grad()
def encode_pictures(model: gouache.Model, pictures: list[Image.Image]) -> Tensor:
    rows = [model.encode(pixels.to_tensor([picture])) for picture in with_progress(pictures, "encoding", every=128)]
    return torch.cat(rows)


def encode_captions(model: gouache.Model, texts: Sequence[str]) -> Conditioning:
    """Contexts (B, 77, D), with gradients for the vectors of an embedding."""
    return Conditioning(model.encode_prompts(list(texts), emphasis="ignore").context)


@torch.no_grad()
def unconditional(model: gouache.Model) -> Conditioning:
    return encode_captions(model, [""])


def rows_of(number: int, count: int) -> list[int]:
    """The examples of batch `number`, of so many."""
    return torch.randperm(count, generator=step_generator(SEED, number))[:BATCH].tolist()


def encoded_batches(latents: Tensor, contexts: Tensor) -> Batches:
    def batch(number: int) -> Batch:
        rows = rows_of(number, len(latents))
        return Batch(latents[rows], Conditioning(contexts[rows]))

    return batch


def optimise(run: Run, name: str, objective: Denoising, batches: Batches, rate: float) -> Mapping[str, Tensor]:
    """Train in FOLDER/runs/NAME, where an interrupted run goes on; returns the weights."""
    settings = Settings(
        steps=run.steps, batch=BATCH, learning_rate=rate, warmup=0, final_rate=0, weight_decay=0, ema_decay=0
    )
    result = loop.train(objective, batches, settings, run.folder / "runs" / name, on_log=print_progress)
    if not result.finished:
        raise KeyboardInterrupt
    return result.weights


if __name__ == "__main__":
    sys.exit(main())
