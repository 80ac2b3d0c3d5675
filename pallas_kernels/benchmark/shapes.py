"""The matrices of known models, the numbers of tokens, and their order in the benchmark."""

from collections.abc import Collection, Sequence

Shape = tuple[int, int]

MODELS: dict[str, dict[Shape, str]] = {
    "llama-7b": {(4096, 4096): "q, k, v, o", (11008, 4096): "gate, up", (4096, 11008): "down"},
    "llama-13b": {(5120, 5120): "q, k, v, o", (13824, 5120): "gate, up", (5120, 13824): "down"},
    "llama-65b": {(8192, 8192): "q, k, v, o", (22016, 8192): "gate, up", (8192, 22016): "down"},
    "falcon-7b": {
        (4672, 4544): "query_key_value",
        (4544, 4544): "dense",
        (18176, 4544): "dense_h_to_4h",
        (4544, 18176): "dense_4h_to_h",
    },
    "falcon-40b": {
        (9216, 8192): "query_key_value",
        (8192, 8192): "dense",
        (32768, 8192): "dense_h_to_4h",
        (8192, 32768): "dense_4h_to_h",
    },
}
"""The shapes (out, in) of each model's matrices, with their names in checkpoints."""

TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048]

FIRST_SHAPES, FIRST_TOKENS = [(4096, 11008), (11008, 4096)], [1, 16, 2048]
"""The settings to measure first, because they matter most if the time limit ends the run."""


def names(models: Collection[str]) -> dict[Shape, str]:
    """The distinct shapes of these models' matrices, each with the names of its matrices.

    Example:
      >>> names(["llama-7b"])[4096, 11008]
      'llama-7b down'
    """
    found: dict[Shape, list[str]] = {}
    for model in models:
        for shape, name in MODELS[model].items():
            found.setdefault(shape, []).append(f"{model} {name}")
    return {shape: "; ".join(matrices) for shape, matrices in found.items()}


def plan(shapes: Collection[Shape], tokens: Collection[int]) -> list[tuple[Shape, Sequence[int]]]:
    """The order of the work: shapes with numbers of tokens, `FIRST_SHAPES` with `FIRST_TOKENS` before the rest.

    Example:
      >>> plan([(16, 16), (4096, 11008)], [1, 2])
      [((4096, 11008), [1]), ((16, 16), [1, 2]), ((4096, 11008), [2])]
    """
    first = {(shape, number) for shape in FIRST_SHAPES for number in FIRST_TOKENS}
    work = [(shape, [n for n in tokens if (shape, n) in first]) for shape in FIRST_SHAPES if shape in shapes]
    work += [(shape, [n for n in tokens if (shape, n) not in first]) for shape in shapes]
    return [(shape, numbers) for shape, numbers in work if numbers]
