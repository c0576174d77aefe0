"""What to change when the memory is not enough, said before a run by `--dry-run`, or when a run ends for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from gouache.app.training.folder import RunFolder
from gouache.errors import TrainingError, is_out_of_memory, printable
from gouache.files.source import size_text
from gouache.training.run_settings import RunSettings

# Of torch's allocators: "you tried to allocate 4294967296 bytes", "Tried to allocate 2.50 GiB".
_AMOUNT = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMG]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@contextmanager
def explained(settings: RunSettings, folder: RunFolder) -> Iterator[None]:
    """Within the block, a lack of memory is a TrainingError of one line that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"{reason(error)}; {ways_to_save(settings)}; {_kept(folder)}") from None


def reason(error: Exception) -> str:
    """What was not enough for how much, as far as the error says."""
    amount = _AMOUNT.search(str(error))
    if amount is None:
        return "the memory is not enough"
    return f"the memory is not enough for another {size_text(round(float(amount[1]) * _UNITS[amount[2].lower()]))}"


def ways_to_save(settings: RunSettings) -> str:
    """What to change for less memory; what costs least is first."""
    train, memory, ways = settings.train, settings.memory, list[str]()
    if not memory.checkpointing:
        ways.append("memory.checkpointing = true")
    if train.batch > 1:
        ways.append(f"train.batch below {train.batch}, with train.accumulate to make up for it")
    if memory.dtype not in ("bf16", "fp16"):
        ways.append("memory.dtype = bf16")
    elif memory.dtype == "bf16" and train.rounding == "master" and settings.result == "model":
        ways.append("train.rounding = stochastic")
    if train.ema_decay and not train.ema_on_cpu and settings.device != "cpu":
        ways.append("train.ema_on_cpu = true")
    if settings.result == "model":
        ways.append("adapter.form = lora")
    size = "slider.size" if settings.mode == "slider" else "data.resolution"
    return f"set {'; or '.join([*ways, f'a smaller {size}'])}"


def _kept(folder: RunFolder) -> str:
    if not (steps := folder.steps()):
        return "no checkpoint was saved yet"
    command = shlex.join(["gouache", "train", "run", printable(str(folder.path))])
    return f"the checkpoint of step {steps[-1]} is kept; go on from it with {command}"
