"""python -m recipes.splices.fit FOLDER [--only night|zorblax|rosy] [--steps N] [--model mini]

Fits three adapters to the embedded model and writes them in the forms that are most in use: `night`, a LoRA of a style
(kohya's names); `zorblax`, an embedding of a character that no one has seen (A1111's `.pt`); `rosy`, a hypernetwork
(A1111's `.pt`) that paints backgrounds pink. Some minutes each on two cores. The same objective as the model's
own pretraining; of the model itself nothing changes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from gouache.training.denoising import Captioned, Denoising
from recipes.mini.dataset import sample
from recipes.mini.names import load_things
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import FIRST_STAGE, Scene
from recipes.splices.pictures import CHARACTER, character, night, rosy

SEED, BATCH, SIZE, RANK = 11, 8, 128, 8
STEPS = {"night": 300, "zorblax": 200, "rosy": 400}
SHOWN = 384  # scenes, whose latents are made once
ALONE = replace(FIRST_STAGE, counts=(1.0, 0.0, 0.0), tinted=0.0, often=6)  # the common things oftener, as it was taught

Losses = Callable[[int], Tensor]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--scenes", type=int, default=SHOWN)
    parser.add_argument("--model", default="mini")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in (options.only,) if options.only else tuple(STEPS):
        model = gouache.load(options.model, device="cpu", dtype="fp32")
        fit = {"night": fit_lora, "zorblax": fit_embedding, "rosy": fit_hypernetwork}[name]
        path = fit(model, options.folder, options.steps or STEPS[name], options.scenes)
        print(path)
    return 0


def fit_lora(model: gouache.Model, folder: Path, steps: int, scenes: int) -> Path:
    """A LoRA on every attention and feed-forward layer and every convolution of the U-Net."""
    chance = torch.Generator().manual_seed(SEED)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in model.unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".emb_layers" not in path and "time_embed" not in path:
            out, *inner = layer.weight.shape
            down = torch.randn(RANK, *inner, generator=chance) / layer.weight[0].numel() ** 0.5
            up = torch.zeros(out, RANK, *[1] * (len(inner) - 1))
            pairs[path] = (up.requires_grad_(), down.requires_grad_())
            layer.register_forward_hook(_added(layer, *pairs[path]))
    latents, said = shown(model, lambda scene, glyphs: night(render(scene, glyphs, SIZE)), scenes)
    optimise([part for pair in pairs.values() for part in pair], losses(model, latents, said, dropout=0.1), steps, 6e-4)
    names = kohya_names(model.specs, False)
    tensors = {}
    for path, (up, down) in pairs.items():
        stem = names["unet", path]
        tensors |= {f"{stem}.lora_up.weight": up.detach().half(), f"{stem}.lora_down.weight": down.detach().half()}
        tensors[f"{stem}.alpha"] = torch.tensor(float(RANK))
    target = folder / "night.safetensors"
    write_safetensors(
        target,
        tensors,
        {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK), "ss_network_alpha": str(RANK),
         "modelspec.title": "night", "modelspec.description": "scenes by moonlight, for the embedded model"},
    )  # fmt: skip
    return target


def _added(layer: nn.Linear | nn.Conv2d, up: Tensor, down: Tensor) -> Callable[..., Tensor]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return output + F.conv2d(F.conv2d(inputs[0], down, None, layer.stride, layer.padding), up)
        return output + F.linear(F.linear(inputs[0], down), up)

    return add


def fit_embedding(model: gouache.Model, folder: Path, steps: int, scenes: int) -> Path:
    """A vector under a new name, begun at that of the thing that comes nearest: grapes, round and violet."""
    encoder = model.text_encoders["text_encoder"]
    words = model.tokenizer.encode("grapes")
    vectors = encoder.embed(torch.tensor(words)).detach().clone().requires_grad_()
    rng = Random(SEED)
    drawn = [character(rng, SIZE) for _ in range(scenes)]
    latents = encoded(model, [picture for picture, _ in drawn])
    captions = [text for _, text in drawn]

    model.embeddings.add(CHARACTER, {"text_encoder": vectors})

    def loss(step: int) -> Tensor:
        rows = torch.randperm(len(latents), generator=torch.Generator().manual_seed(step))[:BATCH].tolist()
        context = told(model, [captions[row] for row in rows])
        return objective(model, dropout=0.0).losses(Captioned(latents[rows], Conditioning(context)), step)["loss"]

    optimise([vectors], loss, steps, 5e-4)
    target = folder / f"{CHARACTER}.pt"
    record = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors.detach()}, "name": CHARACTER}
    torch.save({**record, "step": steps, "sd_checkpoint_name": "mini"}, target)
    return target


def fit_hypernetwork(model: gouache.Model, folder: Path, steps: int, scenes: int) -> Path:
    """A pair of small networks for each width that the U-Net attends to."""
    torch.manual_seed(SEED)
    widths = sorted({layer.in_features for name, layer in model.unet.named_modules()
                     if isinstance(layer, nn.Linear) and name.endswith((".to_k", ".to_v"))})  # fmt: skip
    pairs = {width: tuple(_mlp(width) for _ in range(2)) for width in widths}
    for name, layer in model.unet.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith((".to_k", ".to_v")):
            mlp = pairs[layer.in_features][int(name.endswith(".to_v"))]
            layer.register_forward_pre_hook(lambda _, inputs, mlp=mlp: (inputs[0] + mlp(inputs[0]),))
    latents, said = shown(model, lambda scene, glyphs: render(rosy(scene), glyphs, SIZE), scenes)
    parameters = [p for pair in pairs.values() for mlp in pair for p in mlp.parameters()]
    optimise(parameters, losses(model, latents, said, dropout=0.1), steps, 2e-3)
    record = {
        width: tuple({f"linear.{name}": value for name, value in mlp.state_dict().items()} for mlp in pair)
        for width, pair in pairs.items()
    }
    target = folder / "rosy.pt"
    flags = {"layer_structure": [1, 2, 1], "activation_func": "relu", "is_layer_norm": False, "activate_output": False}
    torch.save({**record, "step": steps, "name": "rosy", **flags, "sd_checkpoint_name": "mini"}, target)
    return target


def _mlp(width: int) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
    nn.init.zeros_(made[2].weight)  # it begins by changing nothing
    nn.init.zeros_(made[2].bias)
    return made


def shown(model: gouache.Model, seen: Callable[[Scene, Glyphs], Image.Image], scenes: int) -> tuple[Tensor, Tensor]:
    """(latents, contexts) of the embedded model's kind of scenes, `seen` making each picture."""
    things, glyphs = load_things(), Glyphs()
    drawn = [sample(SEED, index, things, ALONE) for index in range(scenes)]
    latents = encoded(model, [seen(each.scene, glyphs) for each in drawn])
    contexts = [told(model, [each.caption]).clone() for each in drawn]
    return latents, torch.cat(contexts)


def encoded(model: gouache.Model, pictures: list[Image.Image]) -> Tensor:
    rows = [model.encode(pixels.to_tensor([picture])).clone() for picture in progress(pictures, "encoding")]
    return torch.cat(rows)


def told(model: gouache.Model, texts: list[str]) -> Tensor:
    """Contexts through which gradients reach an embedding, unlike those of `encode_prompts`."""
    from gouache.prompts.encode import encode

    return encode(
        texts, model.tokenizer, model.text_encoders, model.text_recipe, embeddings=model.embeddings, emphasis="ignore"
    ).context


def objective(model: gouache.Model, dropout: float) -> Denoising:
    unsaid = Conditioning(told(model, [""]).detach())
    return Denoising(model.unet, model.schedule, model.prediction, unsaid, SEED, dropout)


def losses(model: gouache.Model, latents: Tensor, said: Tensor, dropout: float) -> Losses:
    denoising = objective(model, dropout)

    def loss(step: int) -> Tensor:
        rows = torch.randperm(len(latents), generator=torch.Generator().manual_seed(step))[:BATCH]
        return denoising.losses(Captioned(latents[rows], Conditioning(said[rows])), step)["loss"]

    return loss


def optimise(parameters: list[Tensor], loss: Losses, steps: int, rate: float) -> None:
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


def progress(items: list[Image.Image], what: str) -> Iterator[Image.Image]:
    for number, item in enumerate(items, 1):
        yield item
        if number % 128 == 0 or number == len(items):
            print(f"{what} {number}/{len(items)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
