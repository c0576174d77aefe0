"""What is kept of a run: small, and near enough to go on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gouache.errors import RequestError
from gouache.files.open import open_model
from gouache.files.write import write_safetensors
from gouache.nn.spec import UNetSpec
from gouache.nn.unet import UNet
from recipes.mini.kept import TABLE, packed, part_of
from recipes.mini.train import put


def test_a_unet_comes_back_within_what_eight_bits_tell(tmp_path: Path):
    torch.manual_seed(0)
    unet = UNet(UNetSpec(channels=32, channel_mult=(1, 2), attention_depth=(1, 0), context_dim=16))
    path = tmp_path / "kept.safetensors"
    write_safetensors(path, packed("unet", unet.state_dict()), {})

    back = part_of(open_model(path), "unet")

    assert path.stat().st_size < 1.3 * sum(value.numel() for value in unet.state_dict().values())
    put(UNet(unet.spec), back)
    for name, value in unet.state_dict().items():
        # A row's largest number is 127 steps, and rounding errs by half a step at most; what is small is in float16.
        largest = value.abs().flatten(1).amax(1).unflatten(0, (-1, *[1] * (value.ndim - 1))) if value.ndim > 1 else 0
        assert ((back[name] - value).abs() <= largest / 254 * 1.001 + value.abs() * 2**-11 + 1e-7).all(), name


def test_of_a_token_table_only_the_vectors_that_say_something_are_kept(tmp_path: Path):
    table = torch.zeros(49408, 8)
    table[[3, 700, 49407]] = torch.randn(3, 8).half().float()
    path = tmp_path / "kept.safetensors"
    write_safetensors(path, packed("text", {TABLE: table, "text_projection.weight": torch.ones(8, 8)}), {})

    back = part_of(open_model(path), "text")

    assert path.stat().st_size < 1000
    assert set(back) == {TABLE}
    assert torch.equal(back[TABLE], table)


def test_weights_of_other_names_are_refused():
    layer = nn.Linear(2, 2)
    put(layer, {"weight": torch.ones(2, 2)}, may_lack=("bias",))

    assert torch.equal(layer.weight, torch.ones(2, 2))
    for wrong in ({"weight": torch.ones(2, 2)}, {**layer.state_dict(), "scale": torch.ones(1)}):
        with pytest.raises(RequestError, match=r"start: is a file of another recipe: (bias|scale) is"):
            put(layer, wrong)


def test_a_file_of_an_older_recipe_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from recipes.mini import train

    begin = ["text", "--folder", str(tmp_path), "--start", str(tmp_path / "old.safetensors")]
    write_safetensors(tmp_path / "old.safetensors", {"canvas.draw.weight": torch.ones(3, 128)}, {})

    assert train.main(begin) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: start: is a file of another recipe: draw.weight is (3, 128) there, (84, 128) here"
    ]
