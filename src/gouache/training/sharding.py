"""Weights in shards: each of several processes keeps a part of every trained network, and of all that belongs to it.

FSDP2 (`fully_shard`) collects the weights of a block before it is computed and averages its gradients afterwards. What
the optimizer changes are this process's parts, as ordinary tensors: so moments and averages need no more memory than
they, and every optimizer works that treats each number by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gouache.errors import RequestError
from gouache.nn.clip_text import ClipText
from gouache.training.checkpointing import BLOCKS
from gouache.training.distributed import World

OPTIMIZERS = ("adamw", "adam", "sgd", "lion")
"""Those that treat each number by itself; others need whole matrices, or sums over all weights."""


def shard(networks: Iterable[nn.Module], world: World) -> None:
    """Divide the weights of `networks` among the processes of `world`, block by block. Call it before checkpointing.

    The parameters become other ones: groups are to be made afterwards. Of text encoders only the blocks are divided:
    their embeddings and last norm are also used alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for network in networks:
        device = next(network.parameters()).device
        mesh = init_device_mesh(device.type, (world.size,))
        blocks: list[Any] = [module for module in network.modules() if isinstance(module, BLOCKS)]
        outer = [each for each in blocks if not any(each is not other and each in other.modules() for other in blocks)]
        divided = outer if isinstance(network, ClipText) else [*outer, network]
        for module in divided:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        with torch.no_grad():  # otherwise torch keeps what it makes first, and samples are painted in inference mode
            for module in divided:
                module.unshard()
                module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(parameter: nn.Parameter) -> nn.Parameter:
    """The part of a parameter that this process has, in the same memory; the parameter itself if it is not sharded."""
    whole: Any = parameter
    return nn.Parameter(whole.to_local()) if is_sharded(parameter) else parameter


@torch.no_grad()
def collect(parameters: Mapping[str, nn.Parameter], parts: Mapping[str, nn.Parameter]) -> None:
    """Move the gradients of sharded `parameters` to their `parts`, after each backward."""
    for name, parameter in parameters.items():
        whole: Any = parameter.grad
        if parts[name] is not parameter and whole is not None:
            gradient, part = whole.to_local(), parts[name]
            part.grad = gradient if part.grad is None else part.grad.add_(gradient)
            parameter.grad = None


def check(optimizer: str, rounding: str) -> None:
    """Raises RequestError for settings that sharded weights do not have, and for a torch that is too old."""
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageReader  # type: ignore[reportPrivateImportUsage]  # noqa: F401
    except ImportError:
        raise RequestError(
            "memory.shard", f"needs a newer torch, which writes checkpoints in parts; this is {torch.__version__}"
        ) from None
    if optimizer not in OPTIMIZERS:
        raise RequestError(
            "train.optimizer",
            f"{optimizer} needs more than one part of the weights; with memory.shard use {', '.join(OPTIMIZERS)}",
        )
    if rounding != "master":
        raise RequestError("train.rounding", "stochastic is not available with memory.shard; use master")
