"""A hypernetwork as a file: the .pt of AUTOMATIC1111's web UI, the only format that programs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gouache.errors import RequestError
from gouache.training.targets.export_embedding import write_pickle
from gouache.training.targets.hypernetwork_layers import HypernetworkOptions
from gouache.workshop import save

Sides = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


def export_hypernetwork(
    pairs: Mapping[int, Sides],
    options: HypernetworkOptions,
    path: Path,
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write {width: (state dict for keys, for values)} in float32. Raises RequestError for another suffix."""
    if path.suffix.lower() != ".pt":
        raise RequestError("output", f"{save.shown(path)} does not end in .pt, the format of hypernetworks")
    steps = metadata.get("ss_steps", "")
    value: dict[Any, Any] = {
        width: tuple({name: each.detach().float().cpu().clone() for name, each in side.items()} for side in pair)
        for width, pair in pairs.items()
    }
    value |= {
        "step": int(steps) if steps.isdecimal() else 0,
        "name": path.stem,
        "layer_structure": list(options.structure),
        "activation_func": options.activation,
        "is_layer_norm": options.layer_norm,
        "weight_initialization": options.initialisation,
        "sd_checkpoint": metadata.get("ss_new_sd_model_hash", "")[:10] or None,
        "sd_checkpoint_name": metadata.get("ss_sd_model_name"),
        "activate_output": options.activate_output,
        # Programs from before dropout_structure compute it from these two, which agree with it if it is the usual one.
        "use_dropout": any(options.dropouts),
        "dropout_structure": list(options.dropouts),
        "last_layer_dropout": options.dropouts[-2] != 0,
        "optional_info": metadata.get("ss_training_comment") or None,
    }
    write_pickle(path, value, overwrite=overwrite)
