"""Runs for processes that are killed: each begins or resumes in a folder, and uses other parts of the trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gouache
from gouache.data.folders import read as read_data
from gouache.data.record import PictureOptions
from gouache.data.subset import Subset
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.schedule import Schedule
from gouache.prompts.encode import Sizes
from gouache.training.batch import Batch
from gouache.training.denoising import Denoising
from gouache.training.loop import Batches, train
from gouache.training.noise import NoiseOptions
from gouache.training.objective import Group, Objective, step_generator
from gouache.training.target import Target
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.dropout import Rates
from gouache.training.targets.embedding import EmbeddingOptions, EmbeddingTarget
from gouache.training.targets.hypernetwork import HypernetworkTarget
from gouache.training.targets.hypernetwork_layers import HypernetworkOptions
from gouache.training.targets.options import AdapterOptions
from gouache.training.targets.pivotal import PivotalTarget
from gouache.training.timesteps import Timesteps
from gouache.training.validation import Validation

from ..data.tars import damaged, encoded, write
from .data_sets import batches as batches_of
from .data_sets import plain_caption
from .toys import Regression, denoiser_factory, linear, points, settings, small_autoencoder
from .toys import pictures as small_pictures


class Prefetched:
    """Batches made by threads in advance, as a data set's workers do."""

    def __init__(self, batches: Batches, ahead: int = 3) -> None:
        self.batches, self.ahead = batches, ahead
        self.pool, self.waiting = ThreadPoolExecutor(2), dict[int, Future[Any]]()

    def __call__(self, number: int) -> Any:
        for wanted in range(number, number + self.ahead):
            if wanted not in self.waiting:
                self.waiting[wanted] = self.pool.submit(self.batches, wanted)
        return self.waiting.pop(number).result()


class Net(nn.Module):
    """In place of a U-Net: reads everything, in a few hundred operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.context = nn.Linear(6, 8)
        self.rate = 0.0

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        hidden = self.conv_in(x) + self.context(context).mean(1)[:, :, None, None] + t[:, None, None, None] / 1000
        return self.conv_out(torch.nn.functional.silu(hidden) * self.rate)


class Everything:
    """A target that trains the network and the captions' vectors, at two rates, with a dropout per batch."""

    trains_text = True

    def __init__(self, net: Net, words: nn.Embedding) -> None:
        self.net, self.words = net, words
        self.start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        self.networks: Mapping[str, nn.Module] = {"unet": net, "text": words}
        self.evaluated = self.networks

    def groups(self) -> list[Group]:
        named = {f"unet.{name}": parameter for name, parameter in self.net.named_parameters()}
        return [Group(named), Group({"text.weight": self.words.weight}, rate=0.5, decay=False)]

    def config(self) -> dict[str, Any]:
        return {"form": "everything"}

    def begin_batch(self, number: int) -> None:
        self.net.rate = 0.5 + float(torch.rand((), generator=step_generator(77, number)))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        trained = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        self.net.load_state_dict(self.start)
        try:
            yield
        finally:
            self.net.load_state_dict(trained)

    def export(self, *_: Any, **__: Any) -> None: ...


def captioned(number: int) -> Batch:
    generator = step_generator(5, number)
    count = 2 + number % 2  # short batches too
    return Batch(
        torch.randn(count, 4, 4, 4 + 4 * (number % 3), generator=generator),
        captions=tuple(f"{int(word)}" for word in torch.randint(1, 9, (count,), generator=generator)),
        sizes=(Sizes((32, 32)),) * count,
        weights=torch.full((count,), count / 3),
        mask=torch.rand(count, 1, 4, 4 + 4 * (number % 3), generator=generator),
        regularization=torch.arange(count) == 0,
        names=tuple(f"{number}-{row}" for row in range(count)),
    )


def seeded(network: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def denoising() -> tuple[Denoising, Batches]:
    net, words = seeded(Net()), seeded(nn.Embedding(10, 6))
    target = Everything(net, words)

    def encode(captions, _sizes) -> Conditioning:
        return Conditioning(words(torch.tensor([[int(caption or 0)] * 2 for caption in captions])))

    objective = Denoising(
        denoiser_factory(net, Schedule.scaled_linear(), "v"), target.networks, Conditioning(torch.zeros(1, 2, 6)),
        seed=4, dropout=0.3, target=target, encode=encode, prior="frozen", prior_weight=0.5, distance="huber",
        noise=NoiseOptions(0.1, 0.1, True, 3, 0.3, 0.1, True), timesteps=Timesteps("logit-normal", shift=1.5),
        base="toy",
    )  # fmt: skip
    return objective, Prefetched(captioned)


class Poisoned(Regression):
    """Not finite in every seventh batch."""

    def losses(self, batch: Any, number: int, /) -> Mapping[str, Tensor]:
        loss = super().losses(batch, number)["loss"]
        return {"loss": loss * math.nan if number % 7 == 3 else loss}


class Swapping(torch.optim.Optimizer):
    """Trains other weights than it gives to use, as schedule-free optimizers do; swapping them back is not exact."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "train_mode": False, "k": 0})

    def _swap(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        weight = 1 - 1 / 0.9 if train else 0.1
                        parameter.data.lerp_(self.state[parameter]["z"], weight)
            group["train_mode"] = train

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(z, 1 / (group["k"] + 1)).sub_(parameter.grad, alpha=0.1 * group["lr"])


def in_half(number: int) -> tuple[Tensor, ...]:
    return tuple(each.bfloat16() for each in points(number))


def regression_validation(objective: Regression, dtype: torch.dtype = torch.float32):
    x, y = (each.to(dtype) for each in points(10_000))

    @torch.no_grad()
    def validate() -> Mapping[str, float]:
        return {"loss": float((objective.net(x) - y).pow(2).mean())}

    return validate


def on_a_model(kind: str, file: str) -> tuple[Denoising, Batches]:
    """An embedding, a hypernetwork with dropouts, or a LoRA with an embedding, of the model in `file`."""
    model = gouache.load(file, device="cpu", dtype="fp32")
    word = EmbeddingOptions("zorb", 2)
    if kind == "hypernetwork":
        layers = HypernetworkOptions((1, 2, 1, 1), "swish", layer_norm=True, dropout=(0, 0.3, 0.3, 0))
        target: Target = HypernetworkTarget(model, layers, seed=3)
    elif kind == "embedding":
        target = EmbeddingTarget(model, word)
    else:
        adapter = AdapterTarget(model, AdapterOptions(rank=2, dropouts=Rates(rank=0.3)), seed=3)
        target = PivotalTarget(adapter, EmbeddingTarget(model, word))

    def encode(captions, sizes) -> Conditioning:
        return model.encode_prompts(list(captions), size=(32, 32))

    def batch(number: int) -> Batch:
        latents = torch.randn(2, 4, 4, 4, generator=step_generator(6, number))
        return Batch(latents, captions=("a zorb", "red zorb"), sizes=(Sizes((32, 32)),) * 2)

    with torch.no_grad():
        unconditional = encode([""], None)
    return Denoising(
        model.denoiser, target.networks, unconditional, seed=4, target=target, encode=encode, base=file
    ), batch  # fmt: skip


def streamed(folder: Path) -> Batches:
    """Batches of a stream of two shards next to `folder`, shuffled within one, with a damaged picture."""
    shards = folder.parent / "shards"
    for shard in range(2):
        members = dict[str, bytes | str]()
        for number in range(5):
            picture = encoded(number, ((64, 64), (96, 64))[number % 2])
            members[f"{number}.png"] = damaged(picture) if number == 3 else picture
            members[f"{number}.txt"] = str(1 + shard + number)
        path = write(shards / f".{os.getpid()}" / f"{shard}.tar", members)
        os.replace(path, shards / path.name)  # other processes read the same
    records = read_data(shards, Subset(picture_options=PictureOptions(flip=True, random_crop=True)), stream=True)
    return batches_of(
        records.records,
        None,
        text=None,
        batch=2,
        workers=2,
        window=1,
        on_damaged=lambda line: None,
        caption=plain_caption,
    )


def start(name: str, folder: Path) -> tuple[Objective, Batches, Any, dict[str, Any]]:
    """(objective, batches, validate, settings) of the run `name` in `folder` at the start of a process."""
    if name == "denoising":
        objective, batches = denoising()
        held_out = [replace(captioned(number), regularization=None) for number in (1001, 1002)]
        return objective, batches, Validation(objective, held_out, points=2), {"accumulate": 2, "ema_decay": 0.9}
    if ":" in name:
        objective, batches = on_a_model(*name.split(":", 1))
        return objective, batches, None, {"ema_decay": 0.9}
    if name == "shards":
        objective, _ = denoising()
        return objective, streamed(folder), None, {"accumulate": 2}
    if name == "autoencoder":
        return small_autoencoder(), small_pictures, None, {"batch": 2, "accumulate": 2, "ema_decay": 0.9}
    if name == "skipping":
        poisoned = Poisoned(linear())
        return poisoned, points, regression_validation(poisoned), {"not_finite": "skip", "keep_every": 8}
    if name == "schedule-free":
        free = Regression(linear())
        return free, points, regression_validation(free), {"optimizer": f"{__name__}.Swapping"}
    half = Regression(linear().bfloat16())
    validate = regression_validation(half, torch.bfloat16)
    return half, Prefetched(in_half), validate, {"rounding": name, "optimizer": "muon", "ema_decay": 0.9}


NAMES = ("denoising", "shards", "autoencoder", "skipping", "schedule-free", "stochastic", "master")


def go(name: str, folder: Path, steps: int, save_seconds: float) -> None:
    torch.set_num_threads(1)
    objective, batches, validate, values = start(name, folder)
    chosen = {"schedule": "cosine", "restarts": 1, "warmup": 3, "log_steps": 1, "validate_steps": 4, "keep_best": 2}
    given = settings(**{**chosen, "steps": steps, "save_seconds": save_seconds, **values})
    train(objective, batches, given, folder, validate=validate, on_note=lambda _: None, seconds=3600)


Go = Callable[[str, Path, int, float], None]
