"""CLIP's text tower for all families: CLIP-L, and OpenCLIP's ViT-H and bigG with the same names.

OpenCLIP files have other names and fused tensors; `layouts/text.py` maps them to these names as views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gouache.nn.clip import Embedding, Encoder
from gouache.nn.spec import TextSpec


@dataclass(frozen=True)
class TextOutput:
    """The outputs for B prompts of N tokens.

    `layers[0]` is the embedded prompt and `layers[-1]` the last block's output, all (B, N, width) and before the
    final norm. `last` is `layers[-1]` after the final norm. `pooled` (B, projection or width) is `last` at the end
    token, projected if the tower has a projection.
    """

    layers: tuple[Tensor, ...]
    last: Tensor
    pooled: Tensor


class Embeddings(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.token_embedding = Embedding(spec.vocabulary, spec.width)
        self.position_embedding = Embedding(spec.positions, spec.width)


class TextModel(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.encoder = Encoder(spec.layers, spec.width, spec.heads, spec.mlp_width, spec.activation, causal=True)
        self.final_layer_norm = nn.LayerNorm(spec.width)


class ClipText(nn.Module):
    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.text_model = TextModel(spec)
        if spec.projection is not None:
            self.text_projection = nn.Linear(spec.width, spec.projection, bias=False)

    def norm(self, x: Tensor) -> Tensor:
        """The final layer norm, for the hidden state of an earlier block (clip skip)."""
        return self.text_model.final_layer_norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> token embeddings (B, N, width), without the position embeddings."""
        return self.text_model.embeddings.token_embedding(tokens)

    def forward(self, tokens: Tensor, vectors: Tensor | None = None) -> TextOutput:
        """tokens (B, N) int64, N <= positions, begin and end tokens included.

        `vectors` (B, N, width) replace the token embeddings; `tokens` then only give the position of the end token.
        """
        vectors = self.embed(tokens) if vectors is None else vectors
        positions = self.text_model.embeddings.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        layers = self.text_model.encoder(vectors + positions)
        last = self.norm(layers[-1])
        # The end token has the highest id; CLIP-L also pads with it, so the first one is the end of the prompt.
        end = (tokens == self.spec.vocabulary - 1).int().argmax(dim=1)
        pooled = last[torch.arange(len(tokens), device=tokens.device), end]
        if self.spec.projection is not None:
            pooled = self.text_projection(pooled)
        return TextOutput(layers, last, pooled)
