"""Record what k-diffusion computes on a small analytic model: tests/diffusion/data/k_diffusion.safetensors.

    python scripts/record_k_diffusion.py

The tests compare every sampler of k-diffusion, step by step with the same noise, and the conversions between sigmas
and timesteps. The package cannot be a test dependency, because it needs torchvision: this script downloads its wheel
alone into a temporary folder, and replaces the other imports of two of its modules by stubs that sampling never calls.
Only `scipy.integrate.quad` is called, on polynomials of degree 3 at most; its replacement is exact for them.

The file contains for each case: `<case>/denoised`, the x0 predictions reported at each step; `<case>/x`, the result;
`<case>/noise`, the noise in the order requested; and `<case>/levels`, the pair of sigmas of each request.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "diffusion" / "data" / "k_diffusion.safetensors"
PACKAGE = "k-diffusion==0.1.1.post1"

CHURN = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 10.0, "s_noise": 1.01}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("sample_euler", {}),
    "euler churn": ("sample_euler", CHURN),
    "euler_ancestral": ("sample_euler_ancestral", {}),
    "euler_ancestral eta": ("sample_euler_ancestral", {"eta": 0.6, "s_noise": 1.02}),
    "heun": ("sample_heun", {}),
    "heun churn": ("sample_heun", CHURN),
    "dpm2": ("sample_dpm_2", {}),
    "dpm2 churn": ("sample_dpm_2", CHURN),
    "dpm2_ancestral": ("sample_dpm_2_ancestral", {}),
    "dpm2_ancestral eta": ("sample_dpm_2_ancestral", {"eta": 0.6, "s_noise": 1.02}),
    "lms": ("sample_lms", {}),
    "lms order": ("sample_lms", {"order": 3}),
    "dpmpp_2s_ancestral": ("sample_dpmpp_2s_ancestral", {}),
    "dpmpp_2s_ancestral eta": ("sample_dpmpp_2s_ancestral", {"eta": 0.6, "s_noise": 1.02}),
    "dpmpp_2m": ("sample_dpmpp_2m", {}),
    "dpmpp_sde": ("sample_dpmpp_sde", {}),
    "dpmpp_sde eta": ("sample_dpmpp_sde", {"eta": 0.6, "s_noise": 1.02, "r": 0.4}),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {}),
    "dpmpp_2m_sde heun": ("sample_dpmpp_2m_sde", {"eta": 0.6, "s_noise": 1.02, "solver_type": "heun"}),
    "dpmpp_3m_sde": ("sample_dpmpp_3m_sde", {}),
    "dpmpp_3m_sde eta": ("sample_dpmpp_3m_sde", {"eta": 0.6, "s_noise": 1.02}),
}


class RecordedNoise:
    """Replaces every noise source of k-diffusion, and keeps the noise it returned."""

    def __init__(self, like: Tensor) -> None:
        self.generator = torch.Generator().manual_seed(20240)
        self.like = like
        self.returned: list[Tensor] = []
        self.levels: list[tuple[float, float]] = []

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        self.returned.append(torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype))
        self.levels.append((float(sigma), float(sigma_next)))
        return self.returned[-1]


class TorchWithNoise(types.ModuleType):
    """torch for k-diffusion's samplers, with a `randn_like` that returns recorded noise."""

    def __init__(self, noise: RecordedNoise) -> None:
        super().__init__("torch")
        self.randn_like = lambda _: noise(0.0, 0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def k_diffusion(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The modules `sampling` and `external` of the package, downloaded into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(folder / "k_diffusion")]
    sys.modules["k_diffusion"] = package
    for name, contents in {
        "scipy": {"integrate": types.SimpleNamespace(quad=quad)},
        "torchdiffeq": {"odeint": None},
        "torchsde": {},
        "torchvision": {},
        "torchvision.transforms": {"functional": None},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    return importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")


def quad(function: Any, start: float, end: float, **_: Any) -> tuple[float, float]:
    points, weights = np.polynomial.legendre.leggauss(8)
    nodes = start + (points + 1) / 2 * (end - start)
    return (end - start) / 2 * sum(weight * function(node) for weight, node in zip(weights, nodes)), 0.0


def record(folder: Path) -> dict[str, Tensor]:
    sys.path.insert(0, str(ROOT / "tests"))
    mixture = importlib.import_module("diffusion.mixture").mixture
    sampling, external = k_diffusion(folder)

    generator = torch.Generator().manual_seed(7)
    sigmas = sampling.get_sigmas_karras(8, 0.03, 14.6).double()
    x = torch.randn((2, 1, 2, 3), generator=generator, dtype=torch.float64) * sigmas[0]
    arrays = {"sigmas": sigmas, "x": x}
    for case, (name, settings) in CASES.items():
        noise = RecordedNoise(x)
        vars(sampling)["torch"] = TorchWithNoise(noise)
        if "noise_sampler" in inspect.signature(getattr(sampling, name)).parameters:
            settings = {**settings, "noise_sampler": noise}
        steps: list[dict[str, Any]] = []
        result = getattr(sampling, name)(mixture, x, sigmas, callback=steps.append, disable=True, **settings)
        arrays |= {f"{case}/denoised": torch.stack([step["denoised"] for step in steps]), f"{case}/x": result}
        if noise.returned:
            arrays |= {f"{case}/noise": torch.stack(noise.returned), f"{case}/levels": torch.tensor(noise.levels)}
    vars(sampling)["torch"] = torch

    for name in ("karras", "exponential", "polyexponential"):
        arrays[f"spacing/{name}"] = getattr(sampling, f"get_sigmas_{name}")(12, 0.0292, 14.6146)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    schedule = external.DiscreteSchedule(((1 - alphas) / alphas).sqrt().float(), quantize=False)
    times = torch.tensor([0.0, 0.25, 1.0, 17.5, 500.0, 951.0, 998.75, 999.0])
    levels = torch.tensor([0.01, 0.0292, 0.1, 0.77, 1.0, 3.3, 14.6, 20.0])
    arrays |= {
        "schedule/times": times,
        "schedule/sigma of times": schedule.t_to_sigma(times),
        "schedule/levels": levels,
        "schedule/t of levels": schedule.sigma_to_t(levels),
        "schedule/nearest t of levels": schedule.sigma_to_t(levels, quantize=True),
        "spacing/uniform": schedule.get_sigmas(12),
    }
    return {name: tensor.contiguous() for name, tensor in arrays.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recorded = record(Path(folder))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(recorded, OUT)
    print(f"{OUT.relative_to(ROOT)}: {len(recorded)} arrays, {OUT.stat().st_size / 1000:.0f} kB")
