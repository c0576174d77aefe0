"""Hypernetworks as runs: what is trained, the start from a file, chosen settings, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gouache.app.settings import Settings
from gouache.app.training import defaults, prepare
from gouache.app.training.folder import RunFolder
from gouache.errors import GouacheError
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
MODE: dict[str, Any] = {"mode": "hypernetwork"}


def test_a_run_goes_on_from_the_weights_of_a_file(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    """As they are in it: the new run's weights before its first step are those of the file, with its layers."""
    first = tmp_path / "first.pt"
    layers = {"structure": [1, 2, 2, 1], "activation": "relu", "layer_norm": True}
    run(settings_of(narrow("sd1").file, pictures, first, **MODE, hypernetwork=layers), tmp_path / "a", settings)
    stored = torch.load(first, weights_only=True)
    assert stored["layer_structure"] == [1, 2, 2, 1] and stored["activation_func"] == "relu"
    assert stored["is_layer_norm"] is True and stored["step"] == 4

    for own, message in (
        (
            {"structure": [1, 3, 1]},
            r"hypernetwork\.structure: is \[1\.0, 3\.0, 1\.0\]; expected \[1.*, 2.*, 2.*, 1.*\], as",
        ),
        ({"activation": "swish"}, 'hypernetwork.activation: is "swish"; expected "relu", as the file of adapter.start'),
        (
            {"use_dropout": True, "last_layer_dropout": True},
            "hypernetwork.use_dropout: is true; expected false, as the file of",
        ),
        ({"initialisation": "XavierNormal"}, 'hypernetwork.initialisation: is "XavierNormal"; expected "Normal", as'),
    ):
        other = settings_of(
            narrow("sd1").file, pictures, tmp_path / "c.pt", **MODE, adapter={"start": str(first)}, hypernetwork=own
        )
        with pytest.raises(GouacheError, match=message):
            prepare.check_model(other, settings)
    same = settings_of(
        narrow("sd1").file, pictures, tmp_path / "c.pt", **MODE, adapter={"start": str(first)}, hypernetwork=layers
    )
    prepare.check_model(same, settings)
    again = settings_of(narrow("sd1").file, pictures, tmp_path / "b.pt", **MODE, adapter={"start": str(first)})
    with prepare.prepared(
        again, RunFolder(tmp_path / "b"), settings, on_note=[].append, on_work=lambda *_: None
    ) as ready:
        trained = {name: each for group in ready.target.groups() for name, each in group.parameters.items()}
        flat = {
            f"hypernetwork.{width}.{side}.{name}": tensor
            for width, pair in stored.items() if isinstance(width, int)
            for side, tensors in enumerate(pair) for name, tensor in tensors.items()
        }  # fmt: skip
        assert trained.keys() == flat.keys()
        assert all(torch.equal(trained[name], tensor) for name, tensor in flat.items())


def test_chosen_settings(pictures: Path, settings: Settings):
    chosen = defaults.choose(
        "hypernetwork", str(pictures), "mini", output=None, trigger="", class_word="", steps=None,
        overrides=["structure=1, 1.5, 1", "activation=swish"], settings=settings,
    )  # fmt: skip
    assert chosen.output == "pictures.pt" and chosen.train.ema_decay == 0
    assert chosen.hypernetwork.structure == [1, 1.5, 1] and chosen.hypernetwork.activation == "swish"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"hypernetwork": {"structure": [1, 3, 2]}}, "structure: is 1, 3, 2; it must begin and end with 1"),
        ({"hypernetwork": {"activation": "swosh"}}, "activation: 'swosh' is not known; the nearest is swish"),
        ({"hypernetwork": {"widths": [7]}}, "widths: 7 is not a width of this model's attention"),
        ({"adapter": {"rank": 8}}, "adapter.rank: has no effect on the mode hypernetwork"),
        ({"mode": "lora", "hypernetwork": {"activation": "relu"}}, "hypernetwork.activation: has no effect on"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    tables: dict[str, Any], message: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    output = tmp_path / ("a.safetensors" if tables.get("mode") == "lora" else "a.pt")
    with pytest.raises(GouacheError, match=message) as caught:
        run(settings_of(narrow("sd1").file, pictures, output, **{**MODE, **tables}), tmp_path / "run", settings)
    assert "\n" not in str(caught.value)
