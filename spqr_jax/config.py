"""What to quantize to: the frozen configuration, presets, and the methods that it compares."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, get_args

from pallas_kernels.errors import SpqrError


@dataclass(frozen=True)
class SpqrConfig:
    """Settings of the solver and of the format; SpQR, GPTQ and round-to-nearest are settings of one algorithm.

    The defaults are the paper's SpQR at 3 bits, with the order, damping and sequence that measured best; the presets
    `SMALL`, `COMPACT` and `NEAR_LOSSLESS` are better at their sizes. `outlier_threshold=None` gives GPTQ; quantizing
    without a Hessian (or without calibration tokens) gives round-to-nearest.

    Attributes:
      bits: width of a weight code: 2, 3, 4, 5 or 8.
      group_size: consecutive input features of one row that share a scale and a zero (β1): 8, 16, 32, 64 or 128.
      scale_bits, zero_bits: width of the codes of scales and zeros; None keeps them in 16 bits.
      stats_group_size: consecutive rows whose statistics are quantized together (β2), a multiple of 16.
      outlier_threshold: τ; a weight is an outlier where its squared error, divided by the inverse Hessian's, exceeds
        τ times the mean of Var(column) / U_ii²; None for no outliers.
      outlier_rows: instead of single weights, this share of a matrix's rows is kept whole: those with the largest
        Σ_j (w_j − ŵ_j)² / U_jj² when rounded to nearest. The paper's ablation; `outlier_threshold` must be None.
      permutation: order in which input features are quantized: `act_order` by falling diag(H), or `identity`.
      damping: share of mean |diag H| added to diag H.
      shrinkage: multiple of ρ, the part of the correlations between input features that is chance, as far as the
        calibration text shows, by which each H_jj is increased, here and in the refit; see `moments.chance`. More than
        1, because H⁻¹ suffers more from chance than H does.
      fit: whether scales and zeros are those of a group's whole range, or of that part of it with the least error.
      simplified: do not leave likely outliers out when scales and zeros are fitted.
      sequential: solve each matrix on inputs computed with the already quantized matrices of its own block, not only
        of the blocks before (the official `--true-sequential`).
      refit: before solving a matrix, move its weights to those that best give the original outputs from the inputs
        that the quantized model will have; a matrix whose product is added to the hidden states is also to give what
        these have lost, see `moments.refit`. Only in sequential runs, where those inputs are known.
      stats_dtype: type of unquantized and of second-level statistics; float32 only to compare with the official code.

    Raises:
      SpqrError: permutation, fit or stats_dtype is none of its values; sizes are checked where there is a matrix.

    Source: Dettmers et al. 2023 (arXiv 2306.03078), Algorithm 1; `refit` and `shrinkage` are this project's.

    Example:
      >>> config = dataclasses.replace(COMPACT, outlier_threshold=0.3)
    """

    bits: int = 3
    group_size: int = 16
    scale_bits: int | None = 3
    zero_bits: int | None = 3
    stats_group_size: int = 16
    outlier_threshold: float | None = 0.2
    outlier_rows: float | None = None
    permutation: Literal["act_order", "identity"] = "act_order"
    damping: float = 0.1
    shrinkage: float = 4.0
    fit: Literal["min_max", "error"] = "min_max"
    simplified: bool = False
    sequential: bool = True
    refit: bool = True
    stats_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        for name in ("permutation", "fit", "stats_dtype"):
            allowed = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in allowed:
                raise SpqrError(f"{name} is {getattr(self, name)!r}, but can only be {' or '.join(allowed)}")


SMALL = SpqrConfig(stats_group_size=64, outlier_threshold=0.8, fit="error")
"""About 3.55 bits per weight."""

COMPACT = SpqrConfig(bits=4, group_size=64, stats_group_size=32, outlier_threshold=1.2, fit="error")
"""About 4.2 bits per weight, as the paper's 3 bits in groups of 16 have, but better: wider codes in larger groups leave
fewer outliers to keep, and lose less."""

NEAR_LOSSLESS = SpqrConfig(bits=4, group_size=32, stats_group_size=32, outlier_threshold=0.1, fit="error")
"""About 4.7 bits per weight."""


class Method(StrEnum):
    """What SpQR is compared with: without outliers it is GPTQ, and that without calibration is round-to-nearest."""

    SPQR = "spqr"
    GPTQ = "gptq"
    RTN = "rtn"

    def config(self, config: SpqrConfig) -> SpqrConfig:
        """The settings with which the solver is this method; round-to-nearest also needs that no tokens are given.

        Example:
          >>> Method.GPTQ.config(COMPACT).outlier_threshold is None
          True
        """
        return config if self is Method.SPQR else replace(config, outlier_threshold=None)
