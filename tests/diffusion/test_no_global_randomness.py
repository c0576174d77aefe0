"""No module may use a global random generator: an image depends on its seed only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from gouache import errors

PACKAGE = Path(errors.__file__).parent

SAMPLING = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
SAMPLING_LIKE = {"rand_like", "randn_like", "randint_like"}  # functions without a `generator` argument
SAMPLING_IN_PLACE = {
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_",
    "trunc_normal_", "xavier_normal_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_", "orthogonal_",
}  # fmt: skip
GLOBAL_SEEDING = {"manual_seed", "manual_seed_all", "seed", "set_rng_state"}
NUMPY_GENERATORS = {"Generator", "Philox", "PCG64", "SFC64", "SeedSequence", "default_rng"}
PYTHON_GENERATORS = {"Random", "SystemRandom"}


def shared_randomness(source: str) -> Iterator[str]:
    """Each call in `source` that uses or seeds a generator shared by the whole process, as "line: call"."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
        on_torch = owner in ("torch", "torch.cuda", "torch.random", "torch.nn.init", "nn.init", "init")
        on_numpy = owner in ("np.random", "numpy.random")
        shared = (
            (on_torch and name in SAMPLING and not has_generator)
            or (name in SAMPLING_LIKE and not has_generator)
            or (name in SAMPLING_IN_PLACE and not has_generator)
            or (on_torch and name in GLOBAL_SEEDING)
            or (on_numpy and name not in NUMPY_GENERATORS)
            or (on_numpy and name == "default_rng" and not node.args)
            or (owner == "random" and name not in PYTHON_GENERATORS)
        )
        if shared:
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_uses_a_global_generator(path: Path):
    assert list(shared_randomness(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.randn(3)",
        "torch.randn_like(x)",
        "torch.randint(0, 3, (2,))",
        "torch.randperm(4)",
        "x.normal_()",
        "nn.init.normal_(x, std=0.02)",
        "torch.manual_seed(3)",
        "np.random.rand(3)",
        "np.random.default_rng()",
        "random.random()",
        "random.shuffle(x)",
    ],
)
def test_the_check_finds_every_use_of_a_global_generator(line: str):
    assert list(shared_randomness(line)) == [f"1: {line}"]


@pytest.mark.parametrize(
    "line",
    [
        "torch.randn(3, generator=g)",
        "x.normal_(generator=g)",
        "torch.Generator().manual_seed(3)",
        "np.random.default_rng(7)",
        "random.Random(3)",
        "g.random()",
    ],
)
def test_the_check_accepts_explicit_generators(line: str):
    assert list(shared_randomness(line)) == []
