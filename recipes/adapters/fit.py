"""python -m recipes.adapters.fit FOLDER [--only night|zorblax|rosy] [--steps N] [--model mini]

Trains three adapters for the embedded model and writes them in the most common formats: `night`, a LoRA of a style
(kohya's names); `zorblax`, an embedding of a character that the model does not know (A1111's `.pt`); `rosy`, a
hypernetwork (A1111's `.pt`) that paints pink backgrounds. Some minutes each on two cores, with the objective of the
model's pretraining. The model's weights do not change.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import gouache
from gouache.diffusion.conditioning import Conditioning
from gouache.files.write import write_safetensors
from gouache.images import pixels
from gouache.layouts.modules import kohya_names
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from recipes.adapters.pictures import CHARACTER, character, night, rosy
from recipes.mini.command import run_command
from recipes.mini.dataset import sample
from recipes.mini.names import Thing, load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import UNIFORM, Scene

SEED, BATCH, SIZE, RANK = 11, 8, 128, 8
STEPS = {"night": 300, "zorblax": 200, "rosy": 400}
SCENES = 384  # their latents are computed once
# Common things more often, as in the model's training.
SINGLE_THING = replace(UNIFORM, count_weights=(1.0, 0.0, 0.0), tinted=0.0, common_weight=6)

StepLoss = Callable[[int], Tensor]  # the loss of a step


@dataclass(frozen=True)
class Run:
    """What a training run works with: the model, the output folder, numbers of steps and scenes, things and font."""

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
        print(fit(Run(model, options.folder, options.steps or STEPS[name], options.scenes, things, glyphs)))


def fit_lora(run: Run) -> Path:
    """A LoRA on every attention and feed-forward layer and every convolution of the U-Net."""
    model = run.model
    generator = torch.Generator().manual_seed(SEED)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in model.unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".emb_layers" not in path and "time_embed" not in path:
            out, *inner = layer.weight.shape
            down = torch.randn(RANK, *inner, generator=generator) / layer.weight[0].numel() ** 0.5
            up = torch.zeros(out, RANK, *[1] * (len(inner) - 1))
            pairs[path] = (up.requires_grad_(), down.requires_grad_())
            layer.register_forward_hook(_lora_hook(layer, *pairs[path]))
    latents, contexts = encoded_scenes(run, lambda scene: night(render(scene, run.glyphs, SIZE)))
    factors = [factor for pair in pairs.values() for factor in pair]
    optimise(factors, step_loss(model, latents, contexts, dropout=0.1), run.steps, 6e-4)
    names = kohya_names(model.specs, False)
    tensors = {}
    for path, (up, down) in pairs.items():
        stem = names["unet", path]
        tensors |= {f"{stem}.lora_up.weight": up.detach().half(), f"{stem}.lora_down.weight": down.detach().half()}
        tensors[f"{stem}.alpha"] = torch.tensor(float(RANK))
    target = run.folder / "night.safetensors"
    write_safetensors(
        target,
        tensors,
        {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK), "ss_network_alpha": str(RANK),
         "modelspec.title": "night", "modelspec.description": "scenes by moonlight, for the embedded model"},
    )  # fmt: skip
    return target


def _lora_hook(layer: nn.Linear | nn.Conv2d, up: Tensor, down: Tensor) -> Callable[..., Tensor]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return output + F.conv2d(F.conv2d(inputs[0], down, None, layer.stride, layer.padding), up)
        return output + F.linear(F.linear(inputs[0], down), up)

    return add


def fit_embedding(run: Run) -> Path:
    """A vector for a new word, initialised with that of the most similar thing: grapes, round and violet."""
    model = run.model
    encoder = model.text_encoders["text_encoder"]
    tokens = model.tokenizer.encode("grapes")
    vectors = encoder.embed(torch.tensor(tokens)).detach().clone().requires_grad_()
    rng = Random(SEED)
    examples = [character(rng, SIZE) for _ in range(run.scenes)]
    latents = encode_pictures(model, [picture for picture, _ in examples])
    captions = [caption for _, caption in examples]

    model.embeddings.add(CHARACTER, {"text_encoder": vectors})

    def loss(step: int) -> Tensor:
        rows = torch.randperm(len(latents), generator=torch.Generator().manual_seed(step))[:BATCH].tolist()
        context = encode_captions(model, [captions[row] for row in rows])
        return objective(model, dropout=0.0).losses(Batch(latents[rows], Conditioning(context)), step)["loss"]

    optimise([vectors], loss, run.steps, 5e-4)
    target = run.folder / f"{CHARACTER}.pt"
    record = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors.detach()}, "name": CHARACTER}
    torch.save({**record, "step": run.steps, "sd_checkpoint_name": "mini"}, target)
    return target


def fit_hypernetwork(run: Run) -> Path:
    """A pair of small networks, for keys and values, per width of the U-Net's attention inputs."""
    model = run.model
    torch.manual_seed(SEED)
    widths = sorted({layer.in_features for name, layer in model.unet.named_modules()
                     if isinstance(layer, nn.Linear) and name.endswith((".to_k", ".to_v"))})  # fmt: skip
    pairs = {width: tuple(_mlp(width) for _ in range(2)) for width in widths}
    for name, layer in model.unet.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith((".to_k", ".to_v")):
            mlp = pairs[layer.in_features][int(name.endswith(".to_v"))]
            layer.register_forward_pre_hook(lambda _, inputs, mlp=mlp: (inputs[0] + mlp(inputs[0]),))
    latents, contexts = encoded_scenes(run, lambda scene: render(rosy(scene), run.glyphs, SIZE))
    parameters = [p for pair in pairs.values() for mlp in pair for p in mlp.parameters()]
    optimise(parameters, step_loss(model, latents, contexts, dropout=0.1), run.steps, 2e-3)
    record = {
        width: tuple({f"linear.{name}": value for name, value in mlp.state_dict().items()} for mlp in pair)
        for width, pair in pairs.items()
    }
    target = run.folder / "rosy.pt"
    flags = {"layer_structure": [1, 2, 1], "activation_func": "relu", "is_layer_norm": False, "activate_output": False}
    torch.save({**record, "step": run.steps, "name": "rosy", **flags, "sd_checkpoint_name": "mini"}, target)
    return target


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
        contexts = [encode_captions(run.model, [each.caption]) for each in samples]
    return latents, torch.cat(contexts)


@torch.no_grad()
def encode_pictures(model: gouache.Model, pictures: list[Image.Image]) -> Tensor:
    rows = [model.encode(pixels.to_tensor([picture])) for picture in with_progress(pictures, "encoding")]
    return torch.cat(rows)


def encode_captions(model: gouache.Model, texts: list[str]) -> Tensor:
    """Contexts (B, 77, D), with gradients for the vectors of an embedding."""
    return model.encode_prompts(texts, emphasis="ignore").context


def objective(model: gouache.Model, dropout: float) -> Denoising:
    unconditional = Conditioning(encode_captions(model, [""]).detach())
    return Denoising(model.denoiser, {"unet": model.unet}, unconditional, SEED, dropout)


def step_loss(model: gouache.Model, latents: Tensor, contexts: Tensor, dropout: float) -> StepLoss:
    denoising = objective(model, dropout)

    def loss(step: int) -> Tensor:
        rows = torch.randperm(len(latents), generator=torch.Generator().manual_seed(step))[:BATCH]
        return denoising.losses(Batch(latents[rows], Conditioning(contexts[rows])), step)["loss"]

    return loss


def optimise(parameters: list[Tensor], loss: StepLoss, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began, mean = time.monotonic(), 0.0
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        optimizer.step()
        schedule.step()
        mean = float(value.detach()) if not step else 0.98 * mean + 0.02 * float(value.detach())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {mean:.4f}  {left:.0f} s left", file=sys.stderr, flush=True)


def with_progress(items: list[Image.Image], label: str) -> Iterator[Image.Image]:
    for number, item in enumerate(items, 1):
        yield item
        if number % 128 == 0 or number == len(items):
            print(f"{label} {number}/{len(items)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
