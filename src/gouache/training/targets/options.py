"""What an adapter is trained with, and which modules of a model it changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from gouache.errors import RequestError, printable
from gouache.layouts.blocks import Block, block_of, blocks
from gouache.layouts.modules import Module
from gouache.layouts.nearest import nearest
from gouache.nn.unet import UNet
from gouache.prompts.recipe import TextRecipe
from gouache.training.targets.dropout import Rates

T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """A form's `parts` (see `targets.initial`), the modules it usually changes, and whether magnitudes are trained."""

    parts: str
    modules: str = "linear"
    dora: bool = False


FORMS: Mapping[str, Form] = {
    "lora": Form("lora"),
    "locon": Form("lora", modules="conv"),
    "dora": Form("lora", dora=True),
    "loha": Form("loha"),
    "lokr": Form("lokr"),
    "ia3": Form("ia3"),
    "oft": Form("oft"),
    "full": Form("full"),
}
MODULES = ("attention", "linear", "conv", "all")
RANKED = ("lora", "loha", "lokr", "oft")  # forms with a rank
SCALED = ("lora", "loha", "lokr")  # forms whose change is multiplied by alpha / rank


@dataclass(frozen=True)
class AdapterOptions:
    """The settings of a trained adapter.

    `parts` are the trained components: unet, text_encoder, text_encoder_2. `modules`: "attention" (the projections of
    attention), "linear" (all linear layers and 1x1 convolutions of transformers and text encoders, the usual choice),
    "conv" (these, and all of the residual, downsampling and upsampling blocks), or "all" linear layers and
    convolutions; None is the form's usual choice. IA3 changes keys, values and the inner values of feed-forwards.
    `norms` adds the differences of the norms' weights and biases.

    `rank` is the rank of all modules; `conv_rank` replaces it for convolutions larger than 1x1 (0 leaves them out). The
    change is multiplied by alpha / rank; alpha None is the rank. For OFT the rank is the largest size of a block, and
    `constraint` limits how far it rotates (0: no limit). `factor` is LoKr's: the largest size of the smaller Kronecker
    factor, -1 for the square root.

    `ranks`, `alphas` and `rates` hold other values by part (unet), block (IN04, M00, OUT11) or prefix of a module's
    path (input_blocks.4.1, unet.middle_block); the most specific one applies. A rank of 0 leaves modules out. `rates`
    multiply the learning rate, `loraplus` that of LoRA's second factor (LoRA+). `stop_after`, by part: it is trained
    for that number of batches only. `clip_skip` is the hidden state of the text encoders that is used, counted from the
    end, 0 for the family's: layers after it are left out.
    """

    form: str = "lora"
    parts: tuple[str, ...] = ("unet",)
    modules: str | None = None
    norms: bool = False
    rank: int = 16
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    factor: int = -1
    constraint: float = 0.0
    loraplus: float = 1.0
    dropouts: Rates = Rates()  # noqa: RUF009  # frozen
    stop_after: Mapping[str, int] = field(default_factory=dict)
    clip_skip: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise RequestError("form", f"{printable(self.form, 40)!r} is not known; use {', '.join(FORMS)}")
        if self.modules is not None and self.modules not in MODULES:
            raise RequestError("modules", f"{printable(self.modules, 40)!r} is not known; use {', '.join(MODULES)}")
        if not self.parts:
            raise RequestError("parts", "names no component; use unet, text_encoder or text_encoder_2")
        base = FORMS[self.form].parts
        for name, given, forms in (
            ("dora", self.dora, SCALED),
            ("loraplus", self.loraplus != 1, ("lora",)),
            ("rank_dropout", self.dropouts.rank > 0, RANKED),
            ("factor", self.factor != -1, ("lokr",)),
            ("constraint", self.constraint != 0, ("oft",)),
        ):
            if given and base not in forms:
                raise RequestError(name, f"does not apply to {self.form}; it applies to {', '.join(forms)}")
        ranks = {"rank": self.rank, "conv_rank": self.conv_rank or 0, "ranks": min(self.ranks.values(), default=0)}
        for name, rank in ranks.items():
            if rank < (name == "rank"):
                raise RequestError(name, f"is {rank}; expected {'1' if name == 'rank' else '0'} or more")
        if self.factor == 0 or self.factor < -1:
            raise RequestError("factor", f"is {self.factor}; expected 1 or more, or -1")
        numbers = {"alpha": self.alpha, "conv_alpha": self.conv_alpha, "constraint": self.constraint,
                   "loraplus": self.loraplus, **{f"alphas.{key}": value for key, value in self.alphas.items()},
                   **{f"rates.{key}": value for key, value in self.rates.items()}}  # fmt: skip
        for name, number in numbers.items():
            if number is not None and not (math.isfinite(number) and number >= 0):
                raise RequestError(name, f"is {number:g}; expected a number of 0 or more")
        check_stops(self.stop_after, self.parts)

    @property
    def rate_factors(self) -> set[float]:
        """The factors of the learning rate of all parameters that may be trained."""
        factors = {*self.rates.values(), *(self.rates.get(part, 1.0) for part in self.parts)}
        return factors | {factor * self.loraplus for factor in factors}

    @property
    def base_form(self) -> str:
        """lora, loha, lokr, ia3, oft or full."""
        return FORMS[self.form].parts

    @property
    def trains_magnitudes(self) -> bool:
        return self.dora or FORMS[self.form].dora


def check_stops(stops: Mapping[str, int], parts: tuple[str, ...]) -> None:
    """Raise RequestError if a part that stops is not trained, or all of them do."""
    for part, number in stops.items():
        if part not in parts:
            raise RequestError("stop_after", f"{printable(part, 40)!r} is not trained; trained are {', '.join(parts)}")
        if number < 0:
            raise RequestError("stop_after", f"is {number} for {part}; expected 0 or more batches")
    if stops and set(stops) == set(parts):
        raise RequestError("stop_after", f"stops all trained parts ({', '.join(parts)}); leave one that goes on")


@dataclass(frozen=True)
class Choice:
    """The form of one module's parts, its rank and alpha."""

    form: str
    rank: int
    alpha: float


def choose(options: AdapterOptions, networks: Mapping[str, nn.Module], recipe: TextRecipe) -> dict[Module, Choice]:
    """The modules that are trained, in the order of the networks, without those that no output depends on.

    Raises RequestError for parts, blocks and prefixes that the model does not have, or if no module is left.
    """
    if unknown := [part for part in options.parts if part not in networks]:
        raise RequestError("parts", f"{printable(unknown[0], 40)!r} is not a part; the model has {', '.join(networks)}")
    unused = {part: _unused(part, networks[part], recipe, options.clip_skip) for part in options.parts}
    candidates = {
        (part, path): layer
        for part in options.parts
        for path, layer in networks[part].named_modules()
        if _is_chosen(options, path, layer) and not path.startswith(unused[part])
    }
    table = _table(networks)
    for name, values in (("ranks", options.ranks), ("alphas", options.alphas)):
        _check_keys(name, values, candidates, table)
    chosen: dict[Module, Choice] = {}
    for module, layer in candidates.items():
        is_norm = not isinstance(layer, nn.Linear | nn.Conv2d)
        large = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        rank = _most_specific(options.ranks, module, table, options.rank)
        alpha = _most_specific(options.alphas, module, table, options.alpha)
        if large and rank:
            rank = rank if options.conv_rank is None else options.conv_rank
            alpha = alpha if options.conv_alpha is None else options.conv_alpha
        if not rank:
            continue
        form = "full" if is_norm else options.base_form
        chosen[module] = Choice(form, rank, float(rank) if alpha is None else alpha)
    if missing := [part for part in options.parts if not any(module[0] == part for module in chosen)]:
        raise RequestError(
            "ranks", f"no module of {missing[0]} is left to train; leave it out of parts, or change ranks"
        )
    return chosen


def rates_of(
    options: AdapterOptions, modules: Iterable[Module], networks: Mapping[str, nn.Module]
) -> dict[Module, tuple[str, float]]:
    """(key of `rates`, factor of the learning rate) of each module; the key is "" where none applies.

    Raises RequestError for a key of `rates` that means none of the modules.
    """
    modules, table = dict.fromkeys(modules), _table(networks)
    _check_keys("rates", options.rates, modules, table)
    keyed = {key: (key, rate) for key, rate in options.rates.items()}
    return {module: _most_specific(keyed, module, table, ("", 1.0)) for module in modules}


def _table(networks: Mapping[str, nn.Module]) -> tuple[Block, ...]:
    unet = networks.get("unet")
    return blocks(unet.spec) if isinstance(unet, UNet) else ()


def _is_chosen(options: AdapterOptions, path: str, layer: nn.Module) -> bool:
    if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
        return options.norms and _is_inside(options, path)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return False
    return _is_inside(options, path) and (options.base_form != "ia3" or path.endswith(IA3_OUTPUTS + IA3_INPUTS))


# Liu et al. 2022: keys and values by output, the second layer of a feed-forward by input.
IA3_OUTPUTS = (".to_k", ".to_v", ".k_proj", ".v_proj")
IA3_INPUTS = (".ff.net.2", ".mlp.fc2")
_ATTENTION = (".attn1.", ".attn2.", ".self_attn.")
_TEXT = "text_model.encoder.layers."


def _is_inside(options: AdapterOptions, path: str) -> bool:
    match options.modules or FORMS[options.form].modules:
        case "attention":
            return any(part in path for part in _ATTENTION)
        case "linear":
            transformer = ".transformer_blocks." in path or path.endswith((".proj_in", ".proj_out"))
            return transformer or path.startswith(_TEXT)
        case "conv":
            in_block = path.startswith(("input_blocks.", "middle_block.", "output_blocks.", _TEXT))
            return in_block and not path.startswith("input_blocks.0.")
        case _:
            return True


def _unused(part: str, network: nn.Module, recipe: TextRecipe, clip_skip: int) -> tuple[str, ...]:
    """The prefixes of layers whose output the model does not use: a text encoder's last, with a clip skip of 2."""
    encoder = next((each for each in recipe.encoders if each.name == part), None)
    if encoder is None or recipe.pooled == part:
        return ()
    layers = len(network.get_submodule("text_model.encoder.layers"))  # type: ignore[arg-type]
    unused = tuple(f"{_TEXT}{layers - 1 - index}." for index in range((clip_skip or encoder.layer) - 1))
    return unused if encoder.final_norm else (*unused, "text_model.final_layer_norm")


def _matches(key: str, module: Module, table: tuple[Block, ...]) -> int:
    """How specifically `key` means the module: 0 not at all, 1 by its part, 2 by its block, more by its path."""
    part, path = module
    if key == part:
        return 1
    if part == "unet" and key == block_of(path, table):
        return 2
    whole = f"{part}.{path}"
    prefix = next((each for each in (whole, path) if f"{each}.".startswith(f"{key.rstrip('.')}.")), None)
    return 0 if prefix is None else 2 + len(key) + (len(part) + 1 if prefix == path else 0)


def _most_specific(values: Mapping[str, T], module: Module, table: tuple[Block, ...], usual: T) -> T:
    found = max(values, key=lambda key: _matches(key, module, table), default=None)
    return values[found] if found is not None and _matches(found, module, table) else usual


def _check_keys(
    name: str, values: Mapping[str, object], modules: Mapping[Module, object], table: tuple[Block, ...]
) -> None:
    for key in values:
        if not any(_matches(key, module, table) for module in modules):
            near = nearest(key, _known_keys(modules, table))
            hint = f"; the nearest is {near}" if near else ""
            raise RequestError(name, f"{printable(key, 60)!r} is no trained part, block or prefix of a module{hint}")


def _known_keys(modules: Mapping[Module, object], table: tuple[Block, ...]) -> Iterator[str]:
    yield from dict.fromkeys(part for part, _ in modules)
    yield from (block.label for block in table)
    yield from (path for _, path in modules)
