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
from spqr_jax.models.ending import EMBEDDING, head_name, leaf_name
from spqr_jax.quantization.checks import rows_together
from spqr_jax.rules import Plan
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
"""What a matrix may get. Along the error of the first one, divergence is measured, see `costs`."""


@dataclass(frozen=True)
class Target:
    """A wanted size, and what it leaves to the matrices of the blocks.

    Attributes:
      goal: the sizes that are good.
      unit_bytes: bytes of one unit of the goal.
      others: bytes that count besides those of these matrices.
    """

    goal: Goal
    unit_bytes: float
    others: int = 0

    def matrix_bytes(self, size: float) -> float:
        """Bytes of these matrices at a size in the goal's unit."""
        return size * self.unit_bytes - self.others

    def size_of(self, matrix_bytes: float) -> float:
        """The size in the goal's unit with so many bytes of these matrices."""
        return (matrix_bytes + self.others) / self.unit_bytes


def bits_target(source: ModelSource, bits: float) -> Target:
    """Bits per weight of the blocks' matrices, within 0.02."""
    return Target(goal_of_bits(bits), weights_of_blocks(source) / 8)


def file_target(source: ModelSource, config: SpqrConfig, nbytes: int) -> Target:
    """Bytes of the whole checkpoint on the disk: at most these, and at most 0.04 bits per weight of the blocks less."""
    slack = 2 * TOLERANCE * weights_of_blocks(source) / 8
    goal = Goal(nbytes - slack, nbytes, "bytes", bytes_on_disk)
    return Target(goal, 1, bytes_beside_matrices(source, config))


def weights_of_blocks(source: ModelSource) -> int:
    """Number of weights in the matrices of all blocks."""
    return source.model.config.num_layers * sum(map(math.prod, kernel_shapes(source)))


def bytes_beside_matrices(source: ModelSource, config: SpqrConfig) -> int:
    """Bytes of all parameters but the blocks' matrices; embedding and head packed as the configuration says."""
    model, total = source.model, 0
    matrices = {(name, "kernel") for name in model.new_block().matrices()}
    ends = Plan(config).ends(model)
    for name, read in source.parts.items():
        for path, leaf in flatten_dict(read()).items():
            own = config.of_ends() if name in ends and path == (leaf_name(name),) else None
            if own is not None:
                if name != head_name(model):
                    own = replace(own, permutation="identity")  # rounded to nearest, in no order
                rows, columns = leaf.shape if name == EMBEDDING else leaf.shape[::-1]
                total += bytes_without_outliers((columns, rows + -rows % rows_together(own)), own)
            elif path not in matrices:
                total += leaf.nbytes
    return total


def mixed_rules(costs: Mapping[str, Sequence[Option]], settings: Sequence[Mapping[str, Any]], nbytes: float) -> Rules:
    """The setting of each matrix with the least total cost at a total size.

    Args:
      costs: the options of each matrix, one for each setting, see `estimate_costs`.
      settings: what matrices may be quantized to.
      nbytes: the largest size of all matrices together.

    Raises:
      SpqrError: even the smallest options are larger.

    Example:
      >>> costs = {"a": [Option(2, 8.0), Option(3, 2.0)], "b": [Option(2, 3.0), Option(3, 1.0)]}
      >>> mixed_rules(costs, [{"bits": 3}, {"bits": 4}], nbytes=5)
      [('a', {'bits': 4}), ('b', {'bits': 3})]
    """
    chosen = allocate(list(costs.values()), nbytes)
    total = sum(options[place].size for options, place in zip(costs.values(), chosen, strict=True))
    if total > nbytes:
        raise SpqrError(
            f"the matrices of the blocks take at least {total:,.0f} bytes, but only {max(nbytes, 0):,.0f} are left for "
            "them: give a larger target"
        )
    return [(name, settings[place]) for name, place in zip(costs, chosen, strict=True)]


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

    The costs are estimated once. Sizes change a little once earlier blocks are quantized: where the measured one is not
    the wanted one, other rules correct it; see `quantize_to_size`.

    Args:
      source: the model.
      destination: directory of the checkpoint.
      calibration_tokens: token ids of sequences of equal length.
      config: settings of the whole run, such as damping, and of embedding and head.
      target: the wanted size.
      overwrite: replace an existing checkpoint.
      options: further arguments of `quantize_checkpoint`.

    Raises:
      SpqrError: the size is out of the range that the settings give, or four tries did not give it; or as for
        `quantize_checkpoint`.
    """
    possible = dividing(kernel_shapes(source), [replace(config, **setting) for setting in SETTINGS])
    settings = [{name: getattr(one, name) for name in SETTINGS[0]} for one in possible]

    def choose(costs: dict[str, Any], tried: Sequence[Try]) -> Choice:
        found = {name: [Option(*option) for option in options] for name, options in costs.items()}
        largest = target.size_of(sum(max(options).size for options in found.values()))
        aim = (target.goal.smallest + target.goal.largest) / 2
        amount = tried[-1].amount + aim - tried[-1].size if tried else aim
        if tried and tried[-1].amount == largest and amount > largest:
            raise SpqrError(
                f"the largest settings give {tried[-1].size:.6g} {target.goal.unit}, less than "
                f"{target.goal.smallest:.6g}: give a smaller target, or --bits 8 instead"
            )
        amount = min(amount, largest)
        return Choice(amount, config, mixed_rules(found, settings, target.matrix_bytes(amount)))

    return quantize_to_size(
        source,
        destination,
        calibration_tokens,
        goal=target.goal,
        survey=lambda: estimate_costs(source, calibration_tokens, possible),
        choose=choose,
        description={"config": dataclasses.asdict(config), "settings": settings, "target": target.goal.largest},
        overwrite=overwrite,
        **options,
    )
