"""The tasks, each for Gouache and diffusers, one per process: python -m benchmarks.tasks TASK SIDE FOLDER DTYPE

Prints one line of JSON: the seconds of each timed call after a warm-up, and the peak of private memory (the process's
own memory, without mapped files).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = ("text", "unet", "vae decode", "load", "cold picture")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main(task: str, side: str, folder: Path, dtype: str, quick: bool) -> dict[str, Any]:
    if task == "make":
        return make(folder, quick)
    if task == "ceiling":
        return ceiling(dtype)
    if task == "cold picture":
        return cold_picture(side, folder)
    if task == "load":
        return load(side, folder, dtype)
    work, flops = {"text": text, "unet": unet, "vae decode": vae_decode}[task](side, folder, dtype, quick)
    return {"seconds": timed(work, 5 if task == "text" else 3), "flops": flops}


def timed(work: Callable[[], object], count: int) -> list[float]:
    import torch

    seconds = []
    with torch.inference_mode():
        work()
        for _ in range(count):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return seconds


def make(folder: Path, quick: bool) -> dict[str, Any]:
    """Write two diffusers pipelines with random weights.

    The first has the width of SD1.5 (`quick`: a tenth of it), the second is tiny and serves cold starts.
    """
    _pipeline(folder / "model", quick)
    _pipeline(folder / "tiny", True)
    return {}


def _pipeline(folder: Path, narrow: bool) -> None:
    import gzip

    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    width = 64 if narrow else 768
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
        num_hidden_layers=3 if narrow else 12, vocab_size=49408, bos_token_id=49406, eos_token_id=49407,
        hidden_act="quick_gelu",
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128) if narrow else (320, 640, 1280, 1280), cross_attention_dim=width,
        attention_head_dim=8, sample_size=64,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64) if narrow else (128, 256, 512, 512), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
    )  # fmt: skip
    from gouache.prompts import tokenizer as ours

    merges = Path(ours.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(merges.read_bytes()).decode().splitlines()[1 : 49152 - 256 - 2 + 1]
    known = ours.Tokenizer()
    folder.mkdir(parents=True)
    vocabulary = {known.token(number): number for number in range(len(known))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines))
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                set_alpha_to_one=False, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def ceiling(dtype: str) -> dict[str, Any]:
    """The highest rate of a square matrix product, with plain weights and with oneDNN's packed weights."""
    import torch

    torch_dtype = getattr(torch, DTYPES[dtype])
    size = 2048
    a, b = torch.randn(size, size).to(torch_dtype), torch.randn(size, size).to(torch_dtype)
    products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(a, b)]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(b.to_mkldnn(), size)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    except (RuntimeError, AttributeError):
        pass
    best = min(min(timed(product, 8)) for product in products)
    return {"flops_per_second": 2 * size**3 / best}


def text(side: str, folder: Path, dtype: str, quick: bool) -> tuple[Callable[[], object], float]:
    import torch

    tokens = torch.randint(0, 49405, (2, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    if side == "gouache":
        encoder = model(folder, dtype).text_encoders["text_encoder"]
        return lambda: encoder(tokens), counted(lambda: encoder(tokens))
    from transformers import CLIPTextModel

    other = CLIPTextModel.from_pretrained(folder / "model/text_encoder").to(getattr(torch, DTYPES[dtype])).eval()
    return lambda: other(tokens), counted(lambda: other(tokens))


def unet(side: str, folder: Path, dtype: str, quick: bool) -> tuple[Callable[[], object], float]:
    """Batch 2, as classifier-free guidance needs, 64x64 latents."""
    import torch

    torch_dtype = getattr(torch, DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 64, 64, generator=generator).to(torch_dtype)
    context = torch.randn(2, 77, 64 if quick else 768, generator=generator).to(torch_dtype)
    t = torch.tensor([500.0, 500.0])
    if side == "gouache":
        network = model(folder, dtype).unet
        return lambda: network(x, t, context), counted(lambda: network(x, t, context))
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel.from_pretrained(folder / "model/unet", torch_dtype=torch_dtype).eval()
    other = other.to(memory_format=torch.channels_last)  # recommended by diffusers, and faster here
    return lambda: other(x, t, context), counted(lambda: other(x, t, context))


def vae_decode(side: str, folder: Path, dtype: str, quick: bool) -> tuple[Callable[[], object], float]:
    import torch

    torch_dtype = getattr(torch, DTYPES[dtype])
    latent = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    if side == "gouache":
        vae = model(folder, dtype).vae
        return lambda: vae.decode(latent), counted(lambda: vae.decode(latent))
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(folder / "model/vae", torch_dtype=torch_dtype).eval()
    other = other.to(memory_format=torch.channels_last)
    return lambda: other.decode(latent), counted(lambda: other.decode(latent))


def load(side: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Load from the folder and read every weight once, in the files' dtype, float32. The page cache has the files."""
    import torch

    for path in sorted((folder / "model").rglob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass

    if side == "gouache":
        import gouache.face  # noqa: F401 - the time of imports is not part of loading

        start = time.perf_counter()
        loaded = model(folder, "fp32")
        modules = [loaded.unet, loaded.vae, *loaded.text_encoders.values()]
    else:
        from diffusers import StableDiffusionPipeline

        start = time.perf_counter()
        pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", torch_dtype=torch.float32)
        modules = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    for module in modules:
        for parameter in module.parameters():
            parameter.detach().as_strided((parameter.numel(),), (1,))[::1024].sum()  # one value per page of memory
    return {"seconds": [time.perf_counter() - start]}


COLD = """
import torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
picture = pipeline("a cat", num_inference_steps=2, width=64, height=64,
                   generator=torch.Generator().manual_seed(1)).images[0]
picture.save({out!r})
"""


def cold_picture(side: str, folder: Path) -> dict[str, Any]:
    """A whole process, from its start to the saved PNG: a tiny model, 2 steps, 64x64."""
    out = str(folder / f"{side}.png")
    if side == "gouache":
        command = [sys.executable, "-m", "gouache.cli.main", "paint", "a cat", "-m", str(folder / "tiny"), "-o", out,
                   "--overwrite", "--steps", "2", "--size", "64x64", "--seed", "1", "--sampler", "DDIM"]  # fmt: skip
    else:
        command = [sys.executable, "-c", COLD.format(folder=str(folder / "tiny"), out=out)]
    return watched(command)


def watched(command: list[str], **options: Any) -> dict[str, Any]:
    """Run a process and measure its duration in seconds and the peak of its private memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, private_mb(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit((process.stderr.read() if process.stderr else b"").decode()[-2000:])
    return {"seconds": [seconds], "peak_private_mb": peak}


def model(folder: Path, dtype: str) -> Any:
    import gouache

    return gouache.load(folder / "model", device="cpu", dtype=dtype)


def counted(work: Callable[[], object]) -> float:
    """Floating-point operations of one call: two per multiply-add of matrix products, convolutions and attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        work()
    return float(counter.get_total_flops())


def private_mb(process: int | str = "self") -> float:
    """The anonymous memory of a process in MB; 0 if the system does not report it."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


class Peak(threading.Thread):
    """Records the peak of this process's private memory in MB, sampled 50 times per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mb = 0.0

    def run(self) -> None:
        while True:
            self.mb = max(self.mb, private_mb())
            time.sleep(0.02)


if __name__ == "__main__":
    watch = Peak()
    watch.start()
    task, side, folder, dtype = sys.argv[1:5]
    measured = main(task, side, Path(folder), dtype, "--quick" in sys.argv)
    print(json.dumps({"peak_private_mb": watch.mb, **measured}))
