"""What a run validates with: the same losses whatever the seed and the batch, and a name that changes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from tests.app.training.short_runs import settings_of
from tests.pipelines import Narrow


def test_curves_of_runs_with_other_seeds_and_batches_can_be_compared(
    narrow: Callable[[str], Narrow], pictures: Path, settings: Settings, tmp_path: Path
):
    (pictures / "0.txt").write_text("a {red|green|blue} zorb\nanother line")

    def measured(batch: int = 2, seed: int = 0, **tables: Any) -> tuple[dict[str, float], str]:
        validation = {"pictures": 3, "timesteps": 2, "probe": 1, **tables}
        chosen = settings_of(
            narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2},
            data={"wildcard": True, "flip": True}, train={"batch": batch, "seed": seed}, validation=validation,
        )  # fmt: skip
        with prepare.prepared(
            chosen, RunFolder(tmp_path / "run"), settings, on_note=lambda line: None, on_work=lambda *_: None,
            fill_caches=False,
        ) as ready:  # fmt: skip
            name = ready.objective.config()["validation"]
            assert isinstance(name, str)
            return dict(ready.validation()), name

    losses, name = measured()
    for others in ({"batch": 1, "seed": 5}, {"batch": 3}):
        again, same = measured(**others)
        assert again == pytest.approx(losses, rel=1e-4) and same == name
    assert len({name, *(measured(**others)[1] for others in ({"timesteps": 3}, {"pictures": 2}, {"pictures": 0}))}) == 4
