"""The dtype of this machine: measured once, again where the machine was busy, and reported by `gouache doctor`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from gouache.app import machine
from gouache.app.doctor import examine
from gouache.app.settings import Settings
from gouache.model import residency
from gouache.model.residency import Timings

CPU = torch.device("cpu")
BUSY = Timings({"fp32": 1.708, "bf16": 1.528}, rounds=1, spread=1.0)  # measured at a load of 6 on 2 cores
QUIET = Timings({"fp32": 0.122, "bf16": 0.064}, rounds=8, spread=1.05)  # the same machine, later


@dataclass
class Machine:
    """What the measurement, the load average (per core) and the processor return. `measured` counts measurements."""

    timings: Timings = QUIET
    load: float | None = 0.1
    native: tuple[str, ...] = ("bf16",)
    measured: list[str] = field(default_factory=list)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Machine:
    this = Machine()

    def measure(on: torch.device) -> Timings:
        this.measured.append(str(on))
        return this.timings

    monkeypatch.setattr(residency, "measure", measure)
    monkeypatch.setattr(residency, "native_dtypes", lambda on: this.native)
    monkeypatch.setattr(machine, "load_per_core", lambda: this.load)
    return this


@pytest.fixture
def fresh(settings: Settings, tmp_path: Path) -> Settings:
    return replace(settings, dtype=None, cache=tmp_path / "cache", models=(tmp_path / "models",))


def best(settings: Settings) -> torch.dtype:
    return machine.best_dtype(CPU, 320, settings)


def test_a_quiet_measurement_is_kept(fake: Machine, fresh: Settings):
    assert [best(fresh) for _ in range(3)] == [torch.bfloat16] * 3

    fake.load = 3.0
    assert best(fresh) == torch.bfloat16 and fake.measured == ["cpu"]


def test_a_narrow_model_on_a_cpu_is_float32_without_a_measurement(fake: Machine, fresh: Settings):
    assert machine.best_dtype(CPU, 64, fresh) == torch.float32
    assert fake.measured == []


def test_a_busy_measurement_follows_the_units_of_the_processor(fake: Machine, fresh: Settings):
    fake.timings, fake.load = BUSY, 3.0

    assert best(fresh) == torch.bfloat16
    fake.native = ()
    assert best(fresh) == torch.float32 and fake.measured == ["cpu"]


def test_a_quiet_measurement_replaces_a_busy_one(fake: Machine, fresh: Settings):
    fake.timings, fake.load = BUSY, 3.0
    best(fresh)
    best(fresh)  # as busy as before: not worth a measurement
    assert len(fake.measured) == 1

    fake.timings, fake.load = QUIET, 0.2
    assert best(fresh) == torch.bfloat16 and len(fake.measured) == 2
    stored = machine.measurement(CPU, fresh)
    assert (stored.timings, stored.busy, stored.count) == (QUIET, False, 2) and len(fake.measured) == 2


def test_a_measurement_at_a_much_lower_load_replaces_a_busy_one(fake: Machine, fresh: Settings):
    fake.timings, fake.load = BUSY, 6.0
    best(fresh)
    fake.timings, fake.load = replace(BUSY, seconds={"fp32": 0.5, "bf16": 0.7}), 2.0

    assert best(fresh) == torch.float32 and len(fake.measured) == 2


def test_a_repeated_measurement_that_is_noisier_is_not_kept(fake: Machine, fresh: Settings):
    fake.timings, fake.load = Timings({"fp32": 0.2, "bf16": 0.1}, rounds=8, spread=1.5), 0.1
    best(fresh)
    fake.timings = Timings({"fp32": 0.1, "bf16": 0.4}, rounds=8, spread=3.0)

    stored = machine.measurement(CPU, fresh)
    assert (stored.timings.spread, stored.count) == (1.5, 2)


@pytest.mark.parametrize("load", [0.1, None])
def test_a_machine_that_is_always_noisy_is_measured_a_few_times_only(
    load: float | None, fake: Machine, fresh: Settings
):
    fake.timings, fake.load = Timings({"fp32": 0.2, "bf16": 0.1}, rounds=8, spread=2.0), load

    for _ in range(20):
        best(fresh)
    assert len(fake.measured) == machine.MAX_MEASUREMENTS


def test_measuring_again_on_request_replaces_what_is_stored(fake: Machine, fresh: Settings):
    best(fresh)
    fake.timings = Timings({"fp32": 0.1, "bf16": 0.3}, rounds=8, spread=1.0)

    machine.measurement(CPU, fresh, again=True)
    assert best(fresh) == torch.float32 and len(fake.measured) == 2


def test_damaged_entries_and_those_of_earlier_versions_are_replaced(fake: Machine, fresh: Settings):
    best(fresh)
    store = fresh.cache / "timings.json"
    ((key, good),) = json.loads(store.read_text()).items()
    earlier = {"fp32": 1.5, "bf16": 1.7}
    damaged = [
        earlier, [1], None, "fast", {**good, "seconds": {}}, {**good, "seconds": {"fp32": "fast"}},
        {**good, "seconds": {"int3": 1.0}}, {**good, "load": "high"}, {**good, "count": None}, {**good, "spread": []},
    ]  # fmt: skip
    for number, entry in enumerate(damaged, 2):
        store.write_text(json.dumps({key: entry}))
        assert best(fresh) == torch.bfloat16 and len(fake.measured) == number
        assert json.loads(store.read_text()) == {key: good}


def test_doctor_reports_this_machine(fake: Machine, fresh: Settings):
    report = examine(fresh)

    assert list(report) == ["gouache", "torch", "devices", "dtypes", "memory", "disk", "models", "step"]
    assert all(lines and all(isinstance(line, str) for line in lines) for lines in report.values())
    assert torch.__version__ in report["torch"][0]
    assert report["devices"][-1] == "cpu is used by default"
    assert report["dtypes"] == [
        "bf16 on cpu: the fastest measured",
        "fp32 for models narrower than the released ones, such as mini",
        "measured: fp32 122 ms, bf16 64 ms; best of 8 rounds, on a quiet machine (load 0.1 per core)",
    ]
    assert report["models"][0].endswith("models: does not exist yet")


def test_doctor_gives_the_reason_when_the_measurement_is_uncertain(fake: Machine, fresh: Settings):
    fake.timings, fake.load = BUSY, 3.0

    assert examine(fresh)["dtypes"] == [
        "bf16 on cpu: the device has units for bf16",
        "fp32 for models narrower than the released ones, such as mini",
        "measured: fp32 1708 ms, bf16 1528 ms; best of 1 round, on a busy machine (load 3.0 per core)",
        "times from a busy machine are uncertain; to measure again: gouache doctor --measure",
    ]

    fake.timings, fake.load = QUIET, 3.0
    assert "fp32 122 ms" in examine(fresh, measure=True)["dtypes"][2] and len(fake.measured) == 2


def test_doctor_reports_the_dtype_that_is_set(fake: Machine, fresh: Settings):
    lines = examine(replace(fresh, dtype="float32"))["dtypes"]

    assert lines[0] == "fp32 on cpu, as set by GOUACHE_DTYPE or config.toml"
    assert lines[1] == "without that setting: bf16, the fastest measured"


def test_a_processor_with_other_units_is_measured_separately(
    fake: Machine, fresh: Settings, monkeypatch: pytest.MonkeyPatch
):
    for number, units in enumerate([(), ("avx512_bf16",), ("amx_bf16", "avx512_bf16")], 1):
        monkeypatch.setattr(residency, "bf16_units", lambda units=units: units)
        best(fresh)
        best(fresh)
        assert len(fake.measured) == number
