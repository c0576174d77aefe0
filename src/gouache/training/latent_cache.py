"""Latents of pictures on disk: one file per (content, view, autoencoder), so that no entry is ever out of date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gouache.data import masks
from gouache.data.buckets import Size
from gouache.data.pictures import Examined, View
from gouache.errors import FileError
from gouache.files.write import bytes_of, describe, write_atomic
from gouache.model.inpainting import concat_channels
from gouache.outside import MalformedText, parse_json, read_outside
from gouache.training import cache_file
from gouache.training.cache_file import Entry

FORMAT = "1"  # of the entries; another one makes all of them anew
CONTENTS = "contents.json"


class LatentCache:
    """What an autoencoder makes of pictures, kept in `folder`; None: nothing is kept.

    `vae` identifies the autoencoder, see `identity_of`. `encode` maps pictures (B, 3, H, W) in [-1, 1] to scaled
    latents (B, C, h, w). It receives one picture at a time, so that a result does not depend on which others are in
    the batch. `channels` is C and `factor` is H / h.

    Entries are "latents" (C, h, w), with "mask" (1, h, w) if the picture has one; or, for a number `hole` of a mask of
    inpainting, "concat" (1 + C, h, w). All are float32 on the CPU.
    """

    def __init__(
        self,
        folder: Path | None,
        vae: str,
        encode: Callable[[Tensor], Tensor],
        *,
        channels: int = 4,
        factor: int = 8,
    ) -> None:
        self.folder, self.vae, self.channels, self.factor = folder, vae, channels, factor
        self._encode = encode

    def key(self, content: Examined, view: View, hole: int | None = None) -> str:
        """The name of an entry: a hash of everything that it depends on."""
        return cache_file.key_of(FORMAT, self.vae, content.digest, repr(view), str(hole))

    def __contains__(self, key: str) -> bool:
        """Whether there is a file of this name; it may be damaged."""
        return self.folder is not None and self._path(self.folder, key).exists()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The entry, None if it is missing or damaged. May be called by several threads."""
        if self.folder is None:
            return None
        file = cache_file.open_entries(self._path(self.folder, key))
        return None if file is None else cache_file.read(file, key)

    def make(self, key: str, picture: Tensor, mask: Tensor | None) -> Entry:
        """Encode `picture` (3, H, W) and keep it with its `mask` (1, H, W). Raises FileError if it cannot be stored."""
        with torch.no_grad():
            latents = self._encode(picture[None])[0].float().cpu().contiguous()
        entry = {"latents": latents}
        if mask is not None:
            entry["mask"] = masks.to_latent(mask, (latents.shape[1], latents.shape[2]))
        return self._store(key, entry)

    def make_concat(self, key: str, picture: Tensor, hole: Tensor) -> Entry:
        """The same for the further channels of an inpainting model; `hole` (1, H, W) is 1 where it shall paint."""
        with torch.no_grad():
            concat = concat_channels(self._encode, picture[None], hole[None])[0]
        return self._store(key, {"concat": concat.float().cpu()})

    def contents(self) -> dict[str, Examined]:
        """Contents of pictures that were decoded before, by digest."""
        if self.folder is None:
            return {}
        try:
            values = parse_json(read_outside(self.folder / CONTENTS))
            return {
                str(digest): Examined(digest, (int(width), int(height)), None if counted is None else float(counted))
                for digest, (width, height, counted) in values.items()
            }
        except (FileError, MalformedText, AttributeError, TypeError, ValueError):  # missing or damaged
            return {}

    def keep_contents(self, contents: Iterable[Examined]) -> None:
        """Add to `contents`. Raises FileError if that is impossible."""
        known = self.contents()
        new = {content.digest: content for content in contents}
        if self.folder is not None and not new.keys() <= known.keys():
            values = {digest: [*each.size, each.counted] for digest, each in {**known, **new}.items()}
            cache_file.make_folder(self.folder)
            write_atomic(self.folder / CONTENTS, json.dumps(values).encode())

    def nbytes(self, size: Size, *, mask: bool = False, concat: bool = False) -> int:
        """The bytes on disk, within a few hundred, of an entry for a picture of `size`, or of its concat channels."""
        width, height = (side // self.factor for side in size)
        return (self.channels + (mask or concat)) * width * height * 4 + 256

    def _store(self, key: str, entry: Entry) -> Entry:
        if self.folder is not None:
            cache_file.write(self._path(self.folder, key), {key: entry})
        return entry

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.safetensors"


def identity_of(networks: Mapping[str, nn.Module], **facts: object) -> str:
    """A hash of the weights of `networks`, and of other `facts` that their results depend on, such as the clip skip."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for network, module in sorted(networks.items()):
        for name, tensor in sorted(module.state_dict().items()):
            info = describe(tensor)
            digest.update(f"{network}.{name} {info.dtype} {info.shape}\n".encode())
            if not tensor.is_meta:  # as in estimates, which read no weights
                digest.update(bytes_of(name, tensor, info))
    return digest.hexdigest()[:40]
