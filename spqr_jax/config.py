"""Settings of quantization: the frozen configuration, presets, and the methods that they compare."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pallas_kernels.errors import SpqrError

Rules = Sequence[tuple[str, Mapping[str, Any] | None]]
"""Pairs of a pattern, as in a shell (`layers_0.*`), and the settings that differ from the configuration; with None,
matrices stay as they are. The first pair that matches a name decides."""


@dataclass(frozen=True)
class SpqrConfig:
    """Settings of the solver and of the format; SpQR, GPTQ and round-to-nearest are settings of one algorithm.

    The defaults are the paper's SpQR at 3 bits, with the order, damping and sequence that measured best. The presets
    `SMALL`, `COMPACT` and `NEAR_LOSSLESS` are better at their sizes. `outlier_threshold=None` gives GPTQ. Without a
    Hessian, or without calibration tokens, every setting rounds to nearest.

    Attributes:
      bits: width of a weight code: 2, 3, 4, 5 or 8.
      group_size: consecutive input features of one row that share a scale and a zero (β1): 8, 16, 32, 64 or 128.
      scale_bits, zero_bits: width of the codes of scales and zeros; None keeps them in 16 bits.
      stats_group_size: consecutive rows whose statistics are quantized together (β2), a multiple of 16.
      outlier_threshold: τ; a weight is an outlier where (w − ŵ)² / U_jj² exceeds τ times the mean of
        Var(column) / U_ii², with H⁻¹ = Uᵀ U. None for no outliers.
      outlier_rows: keeps this share of a matrix's rows whole instead of single weights: those with the largest
        Σ_j (w_j − ŵ_j)² / U_jj² when rounded to nearest. The paper's ablation; `outlier_threshold` must be None.
      permutation: order in which input features are quantized: `act_order` by falling diag(H), or `identity`.
      damping: share of mean |diag H| added to diag H.
      shrinkage: multiple of ρ by which each H_jj is increased, here and in the refit. ρ is the share of sampling noise
        in the correlations between input features, see `moments.sampling_noise`. More than 1, because the noise weighs
        more in H⁻¹ than in H.
      fit: `min_max` fits scales and zeros to a group's whole range, `error` to the part of it with the least error.
      simplified: keeps likely outliers in the fit of scales and zeros.
      sequential: solves each matrix on inputs computed with the quantized matrices of its own block too, not only of
        the blocks before (the official `--true-sequential`).
      embedding_bits: width of the codes of the embedding and the head, see `of_ends`; None leaves them in 16 bits.
      refit: before solving a matrix, moves its weights to give the original outputs from the quantized model's inputs,
        see `refit`. Only in sequential runs, where these inputs are known.
      stats_dtype: type of unquantized and of second-level statistics; float32 only to compare with the official code.

    Raises:
      SpqrError: permutation, fit or stats_dtype is none of its values, or a threshold, damping or shrinkage is NaN,
        infinite or negative. Sizes are checked against the matrices.

    Source: Dettmers et al. 2023 (arXiv 2306.03078), Algorithm 1; `refit` and `shrinkage` are this project's.

    Example:
      >>> config = dataclasses.replace(COMPACT, outlier_threshold=0.3)
      >>> config.bits, config.group_size
      (4, 64)
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
    embedding_bits: int | None = None
    stats_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        for name in ("permutation", "fit", "stats_dtype"):
            allowed = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in allowed:
                raise SpqrError(f"{name} is {getattr(self, name)!r}: give {' or '.join(allowed)}")
        for name in ("outlier_threshold", "outlier_rows", "damping", "shrinkage"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise SpqrError(f"{name} is {value}, but must be a finite number of at least 0")

    def of_ends(self) -> "SpqrConfig | None":
        """The settings of the embedding and the head; None leaves them dense.

        They are these with other codes, and statistics at least as wide: of 3 bits, they spoil codes of 8. For codes of
        8 bits, neither outliers nor a smaller range are looked for: both change nothing.

        Example:
          >>> ends = COMPACT.of_ends()
          >>> ends.bits, ends.scale_bits, ends.outlier_threshold
          (8, 8, None)
        """
        bits = self.embedding_bits
        if bits is None:
            return None
        scale_bits, zero_bits = (width and max(width, bits) for width in (self.scale_bits, self.zero_bits))
        found = dataclasses.replace(self, bits=bits, scale_bits=scale_bits, zero_bits=zero_bits)
        return dataclasses.replace(found, outlier_threshold=None, fit="min_max") if bits == 8 else found


SETTINGS = get_type_hints(SpqrConfig) | {"stats_bits": int | None}
"""The type of each setting that users give by name; `stats_bits` is that of both kinds of statistics."""


def changed(config: SpqrConfig, settings: Mapping[str, Any]) -> SpqrConfig:
    """A configuration with other settings.

    Args:
      config: the configuration.
      settings: values by the names of `SETTINGS`.

    Raises:
      SpqrError: a setting is unknown, or has a value that cannot be.

    Example:
      >>> changed(COMPACT, {"stats_bits": 4}).zero_bits
      4
    """
    for name, value in settings.items():
        if name not in SETTINGS:
            raise SpqrError(f"{name!r} is no setting: give {', '.join(SETTINGS)}")
        if not is_of_type(value, SETTINGS[name]):
            raise SpqrError(f"{name} is {value!r}: give {allowed_values(SETTINGS[name])}")
    fields = dict(settings)
    if "stats_bits" in fields:
        fields["scale_bits"] = fields["zero_bits"] = fields.pop("stats_bits")
    return dataclasses.replace(config, **fields)


def allowed_values(annotation: Any) -> str:
    """The values of a setting, or their types, for a message."""
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return " or ".join(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(get_args(annotation))
    types = get_args(annotation) or (annotation,)
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)


def is_of_type(value: object, annotation: Any) -> bool:
    """Whether a value of JSON or TOML has the type of a setting."""
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return value in list(annotation)
    allowed = get_args(annotation) or (annotation,)
    if isinstance(value, bool) or value is None:
        return type(value) in allowed
    return isinstance(value, allowed) or (float in allowed and isinstance(value, int))


SMALL = SpqrConfig(stats_group_size=64, outlier_threshold=0.8, fit="error", embedding_bits=8)
"""About 3.55 bits per weight of the blocks; as in all presets, embedding and head are in 8 bits."""

COMPACT = SpqrConfig(bits=4, group_size=64, stats_group_size=32, outlier_threshold=1.2, fit="error", embedding_bits=8)
"""About 4.2 bits per weight of the blocks, the size of the paper's 3 bits in groups of 16, and better: SmolLM2's
perplexity is 24.84 instead of 25.75. Wider codes in larger groups need fewer outliers."""

NEAR_LOSSLESS = SpqrConfig(
    bits=4, group_size=32, stats_group_size=32, outlier_threshold=0.1, fit="error", embedding_bits=8
)
"""About 4.7 bits per weight of the blocks."""


class Method(StrEnum):
    """SpQR and its baselines: without outliers it is GPTQ, and GPTQ without calibration is round-to-nearest."""

    SPQR = "spqr"
    GPTQ = "gptq"
    RTN = "rtn"

    def config(self, config: SpqrConfig) -> SpqrConfig:
        """The settings with which the solver is this method; round-to-nearest also needs a run without tokens.

        Example:
          >>> Method.GPTQ.config(COMPACT).outlier_threshold is None
          True
        """
        return config if self is Method.SPQR else dataclasses.replace(config, outlier_threshold=None)
