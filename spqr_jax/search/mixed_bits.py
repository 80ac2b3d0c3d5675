"""Bits where they matter: for a wanted size, the setting of each matrix that costs the model least."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Int

from pallas_kernels.errors import SpqrError
from spqr_jax.config import Rules, SpqrConfig
from spqr_jax.models.ending import EMBEDDING, ENDS, end_names, head_name, leaf_name
from spqr_jax.quantization.checks import rows_together
from spqr_jax.rules import Plan, matrix_paths
from spqr_jax.search.allocation import Option, allocate
from spqr_jax.search.costs import estimate_costs
from spqr_jax.search.size_search import TOLERANCE, Choice, Goal, Try, goal_of_bits, quantize_to_size
from spqr_jax.search.target_bits import bytes_without_outliers, dividing, kernel_shapes
from spqr_jax.storage.directories import bytes_on_disk
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.record import BlockReport

SETTINGS: tuple[Mapping[str, Any], ...] = tuple(
    {"bits": bits, "group_size": size, "stats_group_size": stats, "outlier_threshold": threshold, "fit": "error"}
    for bits, size, stats, threshold in (
        (4, 64, 32, 1.2),
        (2, 32, 32, 0.8),
        (3, 64, 32, 1.2),
        (3, 32, 32, 0.8),
        (3, 16, 64, 0.8),
        (4, 32, 32, 0.4),
        (4, 32, 32, 0.1),
        (5, 64, 32, 1.2),
        (5, 32, 32, 0.2),
    )
)
"""What a matrix of a block may get. Along the error of the first one, divergence is measured, see `costs`."""

END_SETTINGS: tuple[Mapping[str, Any], ...] = tuple(
    {"bits": bits, "scale_bits": bits, "zero_bits": bits, "group_size": size, "stats_group_size": 32}
    | {"outlier_threshold": threshold, "fit": "min_max" if threshold is None else "error"}
    for bits, size, threshold in ((4, 64, 1.2), (3, 32, 0.8), (4, 32, 0.4), (5, 64, 1.2), (5, 32, 0.4), (8, 64, None))
)
"""What embedding and head may get."""

SLOPES = 0.5, 2.0
"""The smallest and the largest change of the size for one of the wanted size that is believed."""


@dataclass(frozen=True)
class Target:
    """A wanted size, and what it leaves to the matrices of the blocks.

    Attributes:
      goal: the sizes that are good.
      unit_bytes: bytes of one unit of the goal.
      others: bytes that count besides those of these matrices.
      ends: whether embedding and head are among these matrices.
    """

    goal: Goal
    unit_bytes: float
    others: int = 0
    ends: bool = False

    def matrix_bytes(self, size: float) -> float:
        """Bytes of these matrices at a size in the goal's unit."""
        return size * self.unit_bytes - self.others

    def size_of(self, matrix_bytes: float) -> float:
        """The size in the goal's unit with so many bytes of these matrices."""
        return (matrix_bytes + self.others) / self.unit_bytes


def bits_target(source: ModelSource, bits: float) -> Target:
    """Bits per weight of the blocks' matrices, within 0.02."""
    return Target(goal_of_bits(bits), weights_of_blocks(source) / 8)


def file_target(source: ModelSource, config: SpqrConfig, nbytes: int, *, ends: bool) -> Target:
    """Bytes of the whole checkpoint on the disk: at most these, and at most 0.04 bits per weight of the blocks less.

    Args:
      source: the model.
      config: says what embedding and head get, unless
      ends: that is chosen as for the matrices of the blocks.
      nbytes: the largest size.
    """
    slack = 2 * TOLERANCE * weights_of_blocks(source) / 8
    goal = Goal(nbytes - slack, nbytes, "bytes", bytes_on_disk)
    return Target(goal, 1, bytes_beside_matrices(source, config, ends=ends), ends)


def weights_of_blocks(source: ModelSource) -> int:
    """Number of weights in the matrices of all blocks."""
    return source.model.config.num_layers * sum(map(math.prod, kernel_shapes(source)))


def bytes_beside_matrices(source: ModelSource, config: SpqrConfig, *, ends: bool = False) -> int:
    """Bytes of all parameters but the matrices of the blocks, and of the ends.

    Args:
      source: the model.
      config: says how embedding and head are packed, unless
      ends: they are not counted.
    """
    model, total = source.model, 0
    matrices = {(name, "kernel") for name in model.new_block().matrices()}
    packed = Plan(config).ends(model)
    for name, read in source.parts.items():
        for path, leaf in flatten_dict(read()).items():
            table = name in end_names(model) and path == (leaf_name(name),)
            if table and ends:
                continue
            own = config.of_ends() if table and name in packed else None
            if own is not None:
                if name != head_name(model):
                    own = replace(own, permutation="identity")  # rounded to nearest, in no order
                rows, columns = leaf.shape if name == EMBEDDING else leaf.shape[::-1]
                total += bytes_without_outliers((columns, rows + -rows % rows_together(own)), own)
            elif path not in matrices:
                total += leaf.nbytes
    return total


def shape_of_ends(source: ModelSource) -> tuple[int, int]:
    """The shape `(in, out)` of embedding and head, without their rows, which are filled up to whole groups."""
    return source.parts[EMBEDDING]()[leaf_name(EMBEDDING)].shape[1], 0


def usable(
    shapes: Sequence[tuple[int, int]], config: SpqrConfig, settings: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The settings whose groups divide matrices of these shapes `(in, out)`, see `dividing`."""
    possible = dividing(shapes, [replace(config, **one) for one in settings])
    return [one for one in settings if replace(config, **one) in possible]


def mixed_rules(
    costs: Mapping[str, Sequence[Option]], settings: Mapping[str, Sequence[Mapping[str, Any]]], nbytes: float
) -> Rules:
    """The setting of each matrix with the least total cost at a total size.

    Args:
      costs: the options of each matrix, see `estimate_costs`.
      settings: of each matrix, one for each option.
      nbytes: the largest size of all matrices together.

    Raises:
      SpqrError: even the smallest options are larger.

    Example:
      >>> costs = {"a": [Option(2, 8.0), Option(3, 2.0)], "b": [Option(2, 3.0), Option(3, 1.0)]}
      >>> mixed_rules(costs, dict.fromkeys(costs, [{"bits": 3}, {"bits": 4}]), nbytes=5)
      [('a', {'bits': 4}), ('b', {'bits': 3})]
    """
    chosen = allocate(list(costs.values()), nbytes)
    total = sum(options[place].size for options, place in zip(costs.values(), chosen, strict=True))
    if total > nbytes:
        raise SpqrError(
            f"the matrices take at least {total:,.0f} bytes, but only {max(nbytes, 0):,.0f} are left for them: give a "
            "larger target"
        )
    return [(name, settings[name][place]) for name, place in zip(costs, chosen, strict=True)]


def next_amount(aim: float, tried: Sequence[Try]) -> float:
    """The size to ask for, so that a wanted one is measured.

    A line through the last two tries, where there are two; one of slope 1 through the only one.

    Args:
      aim: the wanted size.
      tried: sizes asked for, and measured.

    Example:
      >>> next_amount(72.0, []), next_amount(72.0, [Try(72.0, 74.0)])
      (72.0, 70.0)
      >>> round(next_amount(72.0, [Try(72.0, 74.0), Try(70.0, 71.0)]), 2)
      70.67
    """
    if not tried:
        return aim
    slope, (amount, size) = 1.0, tried[-1]
    if len(tried) > 1 and amount != tried[-2].amount:
        slope = float(np.clip((size - tried[-2].size) / (amount - tried[-2].amount), *SLOPES))
    return amount + (aim - size) / slope


def quantize_mixed(
    source: ModelSource,
    destination: Path,
    calibration_tokens: Int[np.ndarray, "sequences tokens"],
    *,
    config: SpqrConfig,
    target: Target,
    overwrite: bool = False,
    **options: Any,
) -> list[BlockReport]:
    """Quantizes a model to a size, each matrix with its own setting, see `mixed_rules`.

    The costs are estimated once. Files are compressed, and sizes change once earlier blocks are quantized: where the
    measured one is not the wanted one, other rules correct it; see `quantize_to_size`.

    Args:
      source: the model.
      destination: directory of the checkpoint.
      calibration_tokens: token ids of sequences of equal length.
      config: settings of the whole run, such as damping, and of embedding and head.
      target: the wanted size.
      overwrite: replace an existing checkpoint.
      options: further arguments of `quantize_checkpoint`.

    Raises:
      SpqrError: the settings do not give the size, or four tries did not; or as for `quantize_checkpoint`.
    """
    in_blocks = usable(kernel_shapes(source), config, SETTINGS)
    configs = [replace(config, **one) for one in in_blocks]
    in_ends = usable([shape_of_ends(source)], config, END_SETTINGS) if target.ends else []
    settings = {name: in_ends if name in ENDS else in_blocks for name in matrix_paths(source.model)}

    def choose(costs: dict[str, Any], tried: Sequence[Try]) -> Choice:
        found = {name: [Option(*option) for option in options] for name, options in costs.items()}
        largest = target.size_of(sum(max(options).size for options in found.values()))
        amount = next_amount((target.goal.smallest + target.goal.largest) / 2, tried)
        if tried and tried[-1].amount == largest and amount > largest:
            raise SpqrError(
                f"the largest settings give {tried[-1].size:.6g} {target.goal.unit}, less than "
                f"{target.goal.smallest:.6g}: give a smaller target, or --bits 8 instead"
            )
        rules = mixed_rules(found, settings, target.matrix_bytes(min(amount, largest)))
        return Choice(min(amount, largest), config, rules)

    return quantize_to_size(
        source,
        destination,
        calibration_tokens,
        goal=target.goal,
        survey=lambda: estimate_costs(source, calibration_tokens, configs, in_ends),
        choose=choose,
        description={
            "config": dataclasses.asdict(config),
            "target": target.goal.largest,
            "settings": [in_blocks, in_ends],
        },
        overwrite=overwrite,
        **options,
    )
