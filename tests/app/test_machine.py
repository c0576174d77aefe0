"""What a machine computes best in is measured once, and anew where something of it changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gouache.app import machine
from gouache.app.doctor import examine
from gouache.app.settings import Settings
from gouache.model import residency


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that were measured; bfloat16 is twice as fast on each."""
    devices: list[str] = []

    def measure(on: torch.device) -> dict[str, float]:
        devices.append(str(on))
        return {"fp32": 1.0, "bf16": 0.5}

    monkeypatch.setattr(residency, "measure", measure)
    return devices


@pytest.fixture
def fresh(settings: Settings, tmp_path: Path) -> Settings:
    return replace(settings, cache=tmp_path / "cache", models=(tmp_path / "models",))


def test_a_device_is_measured_once(measured: list[str], fresh: Settings):
    chosen = [machine.best_dtype(torch.device("cpu"), 320, fresh) for _ in range(3)]

    assert chosen == [torch.bfloat16] * 3
    assert measured == ["cpu"]


def test_a_narrow_model_on_a_cpu_stays_in_float32_unmeasured(measured: list[str], fresh: Settings):
    assert machine.best_dtype(torch.device("cpu"), 64, fresh) == torch.float32
    assert measured == []


def test_a_damaged_memory_is_measured_anew(measured: list[str], fresh: Settings):
    cpu = torch.device("cpu")
    machine.timings(cpu, fresh)
    store = fresh.cache / "timings.json"
    store.write_text(store.read_text().replace("1.0", '"fast"'))

    assert machine.timings(cpu, fresh) == {"fp32": 1.0, "bf16": 0.5}
    assert measured == ["cpu", "cpu"]


def test_doctor_says_what_this_machine_has(measured: list[str], fresh: Settings):
    findings = examine(fresh)

    assert list(findings) == ["gouache", "torch", "devices", "dtypes", "memory", "disk", "models", "step"]
    assert all(lines and all(isinstance(line, str) for line in lines) for lines in findings.values())
    assert torch.__version__ in findings["torch"][0]
    assert findings["devices"][-1] == "cpu is used by default"
    assert findings["dtypes"][0] == "bf16 on cpu, the fastest measured (fp32 1000 ms, bf16 500 ms)"
    assert findings["models"][0].endswith("models: does not exist yet")
