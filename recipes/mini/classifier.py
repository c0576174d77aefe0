"""Which things a picture shows: a small convolutional network that has seen nothing but renderings of its own.

It is the judge of the embedded model, so it shares no seed, no weight and no picture with it. It learns from
scenes spread wider than the model's (any place, more turning) and slightly spoiled (blur, noise, tint), because
a model's pictures are never as crisp as renderings. Trained in about six minutes on one CPU core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from recipes.mini.dataset import CLASSIFIER_HELD_OUT_SEED, CLASSIFIER_SEED, sample
from recipes.mini.names import Thing
from recipes.mini.rendering import Glyphs, render
from recipes.mini.scenes import FIRST_STAGE, Distribution

SIZE = 64
BATCH = 64
STEPS = 1600
RATE = 3e-3
SCENES = Distribution(
    counts=(0.45, 0.55, 0.0), small_size=(0.25, 0.45), placed=1.0, shift=0.06, turned=0.6, turn=25.0, flipped=0.35
)


class Classifier(nn.Module):
    """(B, 3, 64, 64) in -1..1 to (B, classes) logits, one class a thing in the order of the names file."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 160)
        self.stages = nn.Sequential(*(_stage(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(2 * widths[-1], classes)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.stages(pictures)  # (B, 160, 4, 4)
        # The mean tells of large things, the maximum of small ones.
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))


def _stage(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 5, 2, 2, bias=False), nn.BatchNorm2d(out), nn.SiLU())


def as_input(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of any size as (B, 3, 64, 64) in -1..1."""
    small = [picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX) for picture in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in small]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(
    seed: int, things: Sequence[Thing], glyphs: Glyphs, scenes: Distribution = FIRST_STAGE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pictures (B, 3, 64, 64), and which things they show (B, classes) as 0 or 1."""
    number = {thing: index for index, thing in enumerate(things)}
    start = 0
    while True:
        drawn = [sample(seed, index, things, scenes).scene for index in range(start, start + BATCH)]
        shown = torch.zeros(BATCH, len(things))
        for row, scene in enumerate(drawn):
            shown[row, [number[placed.thing] for placed in scene.things]] = 1
        yield as_input([render(scene, glyphs, SIZE) for scene in drawn]), shown
        start += BATCH


def train(things: Sequence[Thing], glyphs: Glyphs, steps: int = STEPS) -> Classifier:
    """A classifier from nothing; the same on every run of the same machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CLASSIFIER_SEED)
        network = Classifier(len(things))
    chance = torch.Generator().manual_seed(CLASSIFIER_SEED)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    for step, (pictures, shown) in zip(range(steps), batches(CLASSIFIER_SEED, things, glyphs, SCENES)):
        logits = network(_spoil(pictures, chance))
        loss = functional.cross_entropy(logits, shown / shown.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 100 == 99:
            print(f"classifier: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    return network.eval()


def _spoil(pictures: Tensor, chance: torch.Generator) -> Tensor:
    """Each picture somewhat blurred, noisy and tinted, by its own lot."""
    lots = torch.rand(4, len(pictures), 1, 1, 1, generator=chance)
    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    tint = torch.randn(len(pictures), 3, 1, 1, generator=chance)
    noise = torch.randn(pictures.shape, generator=chance)
    pictures = torch.lerp(pictures, blurred, lots[0] * (lots[1] < 0.5))
    return pictures + 0.08 * lots[2] * tint + 0.12 * lots[3] * noise


@torch.no_grad()
def top(network: Classifier, pictures: Tensor, count: int) -> list[set[int]]:
    """For each picture the `count` classes that it shows most surely."""
    return [set(row) for row in network(pictures).topk(count).indices.tolist()]


def held_out_accuracy(
    network: Classifier, things: Sequence[Thing], glyphs: Glyphs, count: int, pictures: int = 2048
) -> float:
    """The share of unseen scenes of `count` things, drawn as for the model, whose things are all named."""
    scenes = Distribution(counts=(float(count == 1), float(count == 2), float(count == 3)))
    right = seen = 0
    for inputs, shown in batches(CLASSIFIER_HELD_OUT_SEED, things, glyphs, scenes):
        answers = top(network, inputs, count)
        right += sum(answer == set(row.nonzero().flatten().tolist()) for answer, row in zip(answers, shown))
        seen += len(inputs)
        if seen >= pictures:
            break
    return right / seen


def load_or_train(path: Path, things: Sequence[Thing], glyphs: Glyphs) -> Classifier:
    """The classifier kept at `path`, or one trained now and put there, when this code, names or font differ."""
    recipe = _fingerprint(things, glyphs)
    if path.is_file():
        with safe_open(path, "pt") as kept:
            if (kept.metadata() or {}).get("recipe") == recipe:
                network = Classifier(len(things))
                network.load_state_dict({name: kept.get_tensor(name) for name in kept.keys()})  # noqa: SIM118
                return network.eval()
    network = train(things, glyphs)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file(network.state_dict(), unfinished, {"recipe": recipe})
    unfinished.replace(path)
    return network


def _fingerprint(things: Sequence[Thing], glyphs: Glyphs) -> str:
    settings = repr((things, SCENES, SIZE, BATCH, STEPS, RATE, CLASSIFIER_SEED))
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("classifier.py", "rendering.py"))
    return hashlib.sha256(settings.encode() + code + glyphs.path.read_bytes()).hexdigest()
