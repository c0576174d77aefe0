"""The bundled file: the lift of the context changes no picture, and makes weights stable."""

from __future__ import annotations

import torch

from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.nn.unet import UNet
from recipes.mini.bundle import PREFIXES, lifted


@torch.no_grad()
def test_lifting_the_context_changes_nothing_that_the_unet_says() -> None:
    torch.manual_seed(0)
    text = ClipText(TextSpec(width=64, layers=1, heads=1, mlp_width=64, vocabulary=100))
    unet = UNet(UNetSpec(channels=32, channel_mult=(1, 2), attention_depth=(1, 0), context_dim=64))
    parts = {"text": text, "unet": unet}
    tensors = {PREFIXES[part] + name: value for part, net in parts.items() for name, value in net.state_dict().items()}
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randint(100, (2, 77))
    before, said = text(tokens).last, unet(x, t, text(tokens).last)

    changed = lifted(tensors, by=0.1)
    for part, net in parts.items():
        prefix = PREFIXES[part]
        net.load_state_dict({name[len(prefix) :]: value for name, value in changed.items() if name.startswith(prefix)})

    torch.testing.assert_close(text(tokens).last, before + 0.1)
    torch.testing.assert_close(unet(x, t, text(tokens).last), said, atol=1e-5, rtol=1e-5)
