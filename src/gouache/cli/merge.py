"""`gouache merge`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gouache.errors import RequestError

METHOD_NAMES = (
    "weighted-sum",
    "add-difference",
    "sum-twice",
    "triple-sum",
    "slerp",
    "cosine-a",
    "cosine-b",
    "train-difference",
    "smooth-add",
    "ties",
    "dare",
    "dropout",
    "della",
    "geometric-median",
    "model-stock",
    "top-k",
    "truncated-rank",
)  # fmt: skip - written out, because help must not wait for torch; a test holds it equal to the methods


def merge(
    models: Annotated[
        list[str],
        Argument(
            metavar="A B [C ...] OUT",
            help="Models by file, folder or name, then the file to write; or a recipe.toml and the file to write.",
            show_default=False,
        ),
    ],
    method: Annotated[str, Option(help="How: " + ", ".join(METHOD_NAMES) + ".")] = "weighted-sum",
    alpha: Annotated[float, Option(help="The share of B, or the strength of a difference.")] = 0.5,
    beta: Annotated[float, Option(help="The share of C, where a method has one.")] = 0.5,
    density: Annotated[float, Option(help="The share of a difference that is kept.")] = 0.2,
    epsilon: Annotated[float, Option(help="How far DELLA's chances spread.")] = 0.1,
    rank: Annotated[int, Option(help="Of a truncated difference.")] = 64,
    seed: Annotated[int, Option(help="Of what is drawn by lot.")] = 0,
    blocks: Annotated[
        str | None, Option(help="Alpha for each block: numbers, a file, or a preset such as GRAD_V.")
    ] = None,
    beta_blocks: Annotated[str | None, Option(help="The same for beta.")] = None,
    rule: Annotated[
        list[str] | None, Option(help="PATTERN=ALPHA for single tensors, such as '*.attn2.*=0.7'.", show_default=False)
    ] = None,
    vae: Annotated[str, Option(help="The VAE's source: a, b, c, ..., or merge.")] = "a",
    text: Annotated[str, Option(help="The text encoders' source: merge, or a, b, c, ...")] = "merge",
    dtype: Annotated[str | None, Option(help="fp32, bf16, fp16 or fp8_e4m3.", show_default="that of A")] = None,
    recipe: Annotated[Path | None, Option(help="Where to write the recipe, which makes the same file again.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge models: weighted sums, differences, TIES, DARE and more, with weights for blocks and single tensors."""
    from gouache.app.hashes import sha256
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.workshop import recipe as recipes
    from gouache.workshop.merge import merge as service

    if len(models) < 2:
        raise RequestError("models", "name the models (or a recipe.toml), and then the file to write")
    settings, target = read(), Path(models[-1])
    if len(models) == 2 and models[0].endswith(".toml"):
        wanted = recipes.read(Path(models[0]))
    else:
        told = {"alpha": blocks, "beta": beta_blocks}
        wanted = recipes.Recipe(
            method=method, models=tuple(map(recipes.Source, models[:-1])), alpha=alpha, beta=beta, density=density,
            epsilon=epsilon, rank=rank, seed=seed, vae=vae, text=text, dtype=dtype,
            blocks={knob: text for knob, text in told.items() if text is not None},
            rules={"alpha": tuple(rule)} if rule else {},
        )  # fmt: skip
    found = tuple(replace(each, path=str(resolve(each.path, settings))) for each in wanted.models)
    wanted = replace(wanted, models=found)
    with bytes_bar() as bar:
        done = service(
            wanted, target, hash_of=lambda file: sha256(file, settings), recipe_file=recipe, overwrite=overwrite,
            on_work=bar.show,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"path": str(target), **asdict(done)}))
        return
    print(f"{target}: {done.tensors} tensors, {done.nbytes / 1e6:,.1f} MB, sha256 {done.sha256}")
    for note in done.notes:
        print(f"note: {note}")
    for reason, count in done.left_out.items():
        print(f"left out {count} tensors: {reason}")
