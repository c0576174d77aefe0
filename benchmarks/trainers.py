"""A training process of one side: python -m benchmarks.trainers TASK SIDE MODEL FOLDER [--channels-last]

Prints one line of JSON when it is ready, then reads numbers from its input: so many steps are taken, and their times
printed as JSON. 0 ends it. Gouache runs first; it writes `check.safetensors` (cached data, and the weights, noise and
timesteps to compare the loss for), which diffusers reads.

Gouache runs what `gouache train` runs. diffusers runs the loop of its example `train_text_to_image_lora.py`, or
`train_text_to_image.py` for full weights, with `--mixed_precision bf16` for the LoRA, on cached latents and text
encodings. Both train the full weights in float32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.tasks import Peak

RANK, RATE, SIDE, PICTURES = 16, 1e-4, 256, 8
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]  # the default of diffusers' example, Gouache's "attention"
LORA = ["adapter.modules=attention", f"adapter.rank={RANK}", f"adapter.alpha={RANK}", "memory.dtype=bf16"]
CHECKS = ((100, 0), (500, 1), (900, 2))  # timestep, picture
WATCH = Peak()


class Pace:
    """Answers the parent process between steps; `data_seconds` returns the time that the loop has waited for data."""

    def __init__(self, check: dict[str, Any], data_seconds: Callable[[], float]) -> None:
        self._left, self._data = 0, data_seconds
        self._began: tuple[float, float, float] | None = None
        print(json.dumps(check), flush=True)

    def should_stop(self) -> bool:
        """Called before each step; waits for the next request when the present one is done."""
        if self._left:
            self._left -= 1
            return False
        if self._began is not None:
            now = time.perf_counter(), time.process_time(), self._data()
            seconds, cpu_seconds, data_seconds = (end - start for start, end in zip(self._began, now))
            print(
                json.dumps({
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "data_seconds": data_seconds,
                    "peak_private_mb": WATCH.mb,
                }),
                flush=True,
            )  # fmt: skip
        self._left = int(sys.stdin.readline() or 0) - 1
        self._began = time.perf_counter(), time.process_time(), self._data()
        return self._left < 0


def gouache(task: str, model: Path, folder: Path) -> None:
    from gouache.app import threads as policy
    from gouache.app.settings import read
    from gouache.app.training import defaults
    from gouache.app.training.folder import RunFolder
    from gouache.app.training.prepare import prepared
    from gouache.training import loop

    policy.configure()  # as the command line does
    pictures(folder / "pictures")
    settings = defaults.choose(
        "lora" if task == "lora" else "finetune",
        str(folder / "pictures"),
        str(model),
        output=folder / "out.safetensors",
        trigger="",
        class_word="",
        steps=100_000,
        overrides=[
            f"data.resolution=[{SIDE}]", "data.caption_dropout=0", "train.batch=1", f"train.learning_rate={RATE}",
            "train.warmup=0", "train.schedule=constant", "loss.weighting=none", "train.ema_decay=0",
            "train.save_seconds=100000", "validation.probe=0",
            *(LORA if task == "lora" else ["memory.dtype=fp32", "memory.autocast=no"]),
        ],
        settings=(user := read()),
    )  # fmt: skip
    run = RunFolder(folder / "run")
    with prepared(settings, run, user, on_note=lambda line: None, on_work=lambda what, done, count: None) as ready:
        check = gouache_check(ready, task, folder)
        pace = Pace(check, lambda: ready.batches.waited)
        loop.train(ready.objective, ready.batches, settings.train, run.path, should_stop=pace.should_stop)


def gouache_check(ready: Any, task: str, folder: Path) -> dict[str, Any]:
    """The losses and the norm of their gradient; writes what the other side needs to compute the same."""
    import torch
    from safetensors.torch import save_file

    batches = [ready.batches(number) for number in range(PICTURES)]
    parameters = [each for group in ready.target.groups() for each in group.parameters.values()]
    before = [each.detach().clone() for each in parameters] if task == "lora" else []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a LoRA's second factor is zero at first
        for each in parameters if task == "lora" else ():
            each.copy_(0.02 * torch.randn(each.shape, generator=generator))
    noise = torch.randn(len(CHECKS), *batches[0].latents.shape[1:], generator=generator)
    losses = []
    for row, (t, picture) in enumerate(CHECKS):
        keep = torch.zeros(1, dtype=torch.bool)
        losses.append(ready.objective.loss(batches[picture], torch.tensor([float(t)]), noise[row : row + 1], keep)[0])
        losses[-1].backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    if task == "lora":
        ready.target.export({}, folder / "check-lora", names="peft", metadata={})
    for each, value in zip(parameters, before):
        each.data.copy_(value)
    for each in parameters:
        each.grad = None
    data = {
        "latents": torch.cat([batch.latents for batch in batches]).float(),
        "context": torch.cat([batch.conditioning.context for batch in batches]).float(),
        "noise": noise,
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in data.items()}, folder / "check.safetensors")
    loss = float(torch.stack(losses).detach().mean())
    trained = sum(each.numel() for each in parameters)
    modules = len(ready.target.modules) if task == "lora" else len(parameters)
    return {"loss": loss, "norm": float(norm), "modules": modules, "parameters": trained, **threads()}


def diffusers(task: str, model: Path, folder: Path, channels_last: bool) -> None:
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from safetensors.torch import load_file

    dtype = torch.bfloat16 if task == "lora" else torch.float32
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if task == "lora" else "no")
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    if task == "lora":
        unet.requires_grad_(False)
        unet.to(accelerator.device, dtype=torch.bfloat16)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=ATTENTION))
        cast_training_params(unet, dtype=torch.float32)
    else:
        unet.train()
    parameters = [each for each in unet.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8)
    data = load_file(folder / "check.safetensors")
    examples = [{"latents": latents, "context": context} for latents, context in zip(data["latents"], data["context"])]
    loader = torch.utils.data.DataLoader(examples, shuffle=True, batch_size=1, num_workers=0)
    rates = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)

    def loss_of(latents: torch.Tensor, context: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        noisy = scheduler.add_noise(latents, noise, t)
        predicted = unet(noisy, t, context, return_dict=False)[0]
        return torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")

    before = [each.detach().clone() for each in parameters] if task == "lora" else []
    if task == "lora":
        put_lora(unet, folder / "check-lora")
    losses = []
    for (t, picture), noise in zip(CHECKS, data["noise"]):
        latents, context = (data[name][picture : picture + 1].to(dtype) for name in ("latents", "context"))
        losses.append(loss_of(latents, context, noise[None].to(dtype), torch.tensor([t])))
        accelerator.backward(losses[-1])
    norm = float(torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]))
    optimizer.zero_grad()
    for each, value in zip(parameters, before):
        each.data.copy_(value)
    modules = sum(name.endswith("lora_A.default") for name, _ in unet.named_modules()) or len(parameters)
    trained = sum(each.numel() for each in parameters)
    loss = float(torch.stack(losses).detach().mean())
    check = {"loss": loss, "norm": norm, "modules": modules, "parameters": trained, **threads()}
    del losses, before

    waited = 0.0

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal waited
        while True:
            epoch = iter(loader)
            while True:
                start = time.perf_counter()
                batch = next(epoch, None)
                waited += time.perf_counter() - start
                if batch is None:
                    break
                yield batch

    pace, source, train_loss = Pace(check, lambda: waited), batches(), 0.0
    while not pace.should_stop():
        batch = next(source)
        with accelerator.accumulate(unet):
            latents, context = batch["latents"].to(dtype), batch["context"].to(dtype)
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config["num_train_timesteps"], (len(latents),)).long()
            loss = loss_of(latents, context, noise, t)
            train_loss += accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()


def put_lora(unet: Any, folder: Path) -> None:
    """Set the weights of the attached LoRA to those that Gouache wrote in PEFT's names."""
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = next(iter(sorted(folder.rglob("*.safetensors"))))
    names = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}
    wrong = set_peft_model_state_dict(unet, names, adapter_name="default")
    unexpected = getattr(wrong, "unexpected_keys", None)
    missing = [name for name in getattr(wrong, "missing_keys", ()) if "lora_" in name]
    if unexpected or missing:
        raise SystemExit(f"the LoRA does not fit: {[*(unexpected or ()), *missing][:3]}")


def threads() -> dict[str, int]:
    import torch

    return {"threads": torch.get_num_threads()}


def pictures(folder: Path) -> None:
    """Random pictures with captions, as training data."""
    import numpy
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(0)
    for number in range(PICTURES):
        small = random.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
        Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"coloured clouds, number {number}")


if __name__ == "__main__":
    WATCH.start()
    task, side, model, folder = sys.argv[1:5]
    if side == "gouache":
        gouache(task, Path(model), Path(folder))
    else:
        diffusers(task, Path(model), Path(folder), "--channels-last" in sys.argv)
