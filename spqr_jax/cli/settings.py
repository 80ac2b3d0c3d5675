"""The settings of `spqr quantize`: its options, which of them contradict, and the configuration that they choose."""

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.options import at_least
from spqr_jax.config import COMPACT, NEAR_LOSSLESS, SMALL, Method, SpqrConfig

UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}


def bytes_of(size: str) -> int:
    """Bytes of a size such as `72MB`; units are powers of 1000.

    Raises:
      SpqrError: it is no positive number with one of these units; the message has the option's name.

    Example:
      >>> bytes_of("1.5 GB"), bytes_of("1200")
      (1500000000, 1200)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?b?)\s*", size.lower())
    if found is None:
        raise SpqrError(f"--target-size is {size}, but must be bytes, or a number with KB, MB, GB or TB, such as 72MB")
    return round(float(found[1]) * UNITS[found[2].removesuffix("b") + "b"])


class Preset(StrEnum):
    """Names of configurations."""

    SMALL = "small"
    COMPACT = "compact"
    NEAR_LOSSLESS = "near-lossless"
    PAPER = "paper"


class Order(StrEnum):
    """Orders in which input features are quantized."""

    ACT_ORDER = "act_order"
    IDENTITY = "identity"


PRESETS = {
    Preset.SMALL: SMALL,
    Preset.COMPACT: COMPACT,
    Preset.NEAR_LOSSLESS: NEAR_LOSSLESS,
    Preset.PAPER: SpqrConfig(embedding_bits=8),
}

PresetName = Annotated[
    Preset | None,
    typer.Option(
        help="small: about 3.55 bits per weight; compact (default): 4.2; near-lossless: 4.7; paper: 3-bit codes in "
        "groups of 16, as in the official format."
    ),
]
MethodName = Annotated[Method, typer.Option(help="gptq: no outliers; rtn: round-to-nearest.")]
Bits = Annotated[int | None, typer.Option(callback=at_least(1), help="Width of a weight code: 2, 3, 4, 5 or 8.")]
GroupSize = Annotated[
    int | None, typer.Option(callback=at_least(1), help="Weights that share a scale: 8, 16, 32, 64 or 128.")
]
StatsBits = Annotated[
    int | None, typer.Option(callback=at_least(0), help="Width of scale and zero codes; 0 for 16-bit floats.")
]
OutlierThreshold = Annotated[
    float | None, typer.Option(callback=at_least(0), help="The paper's τ; lower keeps more outliers.")
]
Permutation = Annotated[Order | None, typer.Option(help="Order in which input features are quantized.")]
Damping = Annotated[float | None, typer.Option(callback=at_least(0), help="Share of mean diag H added to diag H.")]
Shrinkage = Annotated[
    float | None,
    typer.Option(callback=at_least(0), help="Shrinkage of correlations, as a multiple of their sampling noise."),
]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(callback=at_least(2), help="Width of the codes of embedding and head: 8, 5, 4 or, not packed, 16."),
]
TargetBits = Annotated[
    float | None,
    typer.Option(
        callback=at_least(1, 16), help="Bits per weight to reach, within 0.02; chooses the settings and the threshold."
    ),
]
Mixed = Annotated[
    bool, typer.Option("--mixed", help="With --target-bits: other settings for each matrix, where bits matter.")
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        callback=lambda size: size and str(bytes_of(size)),
        metavar="SIZE",
        help="Size of the whole checkpoint to reach, such as 72MB; chooses the settings of each matrix.",
    ),
]
NearLossless = Annotated[
    bool,
    typer.Option("--near-lossless", help="Search for the smallest settings that cost less than 1 % of perplexity."),
]


@dataclass(frozen=True)
class Settings:
    """The settings that a user has asked for; None leaves one to the preset.

    Attributes:
      stats_bits: width of scale and zero codes; 0 keeps them in 16 bits.
      permutation, damping, shrinkage, bits, group_size, outlier_threshold: those of `SpqrConfig`.
      embedding_bits: width of the codes of embedding and head; 16 leaves them dense.
      target_bits: bits per weight that an outlier threshold is searched for.
      mixed: at that size, each matrix gets its own settings.
      target_size: size of the checkpoint, see `bytes_of`, at which each matrix gets its own settings.
      near_lossless: search for all settings.
    """

    preset: Preset | None = None
    method: Method = Method.SPQR
    bits: int | None = None
    group_size: int | None = None
    stats_bits: int | None = None
    outlier_threshold: float | None = None
    permutation: Order | None = None
    damping: float | None = None
    shrinkage: float | None = None
    embedding_bits: int | None = None
    target_bits: float | None = None
    mixed: bool = False
    target_size: str | None = None
    near_lossless: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `SpqrConfig` that are set."""
        names = ("bits", "group_size", "outlier_threshold", "damping", "shrinkage")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.permutation is not None:
            values["permutation"] = self.permutation.value
        if self.embedding_bits is not None:
            values["embedding_bits"] = None if self.embedding_bits == 16 else self.embedding_bits
        if self.stats_bits is not None:
            values["scale_bits"] = values["zero_bits"] = self.stats_bits or None
        return values

    @property
    def by_size(self) -> bool:
        """Whether the target size alone chooses the configuration."""
        return self.target_bits is not None and not self.mixed and self.preset is self.bits is self.group_size is None

    @property
    def searches_size(self) -> bool:
        """Whether settings are searched for a size."""
        return self.target_bits is not None or self.target_size is not None

    @property
    def of_all_matrices(self) -> bool:
        """Whether no setting is given that differs between matrices where they are chosen for each."""
        return self.preset is self.bits is self.group_size is self.stats_bits is None

    def check(self, *, distributed: bool, dry_run: bool, rules: bool = False) -> None:
        """Checks that no option contradicts another.

        Raises:
          SpqrError: two options contradict.
        """
        searched = self.searches_size
        if searched and (self.method is not Method.SPQR or self.outlier_threshold is not None or distributed):
            raise SpqrError(
                "--target-bits and --target-size search for SpQR's outlier thresholds in one process: leave out "
                "--method, --outlier-threshold and --distributed"
            )
        if self.target_size is not None and self.target_bits is not None:
            raise SpqrError("--target-bits is the size of the blocks, --target-size that of the checkpoint: give one")
        if self.mixed and self.target_bits is None:
            raise SpqrError("--mixed chooses settings for a size: give --target-bits too")
        if (self.mixed or self.target_size is not None) and not self.of_all_matrices:
            raise SpqrError(
                "--mixed and --target-size choose the settings of each matrix: leave out --preset, --bits, "
                "--group-size and --stats-bits"
            )
        others = self.fields or self.preset or searched or self.method is not Method.SPQR
        if self.near_lossless and (others or distributed):
            raise SpqrError("--near-lossless chooses all settings, in one process: leave out the options of settings")
        if rules and (self.near_lossless or searched or dry_run):
            raise SpqrError(
                "--near-lossless, --target-bits and --target-size choose all settings, and --dry-run takes blocks to "
                "be alike: leave out --skip, --rule and --rules"
            )
        if dry_run and (distributed or self.near_lossless or searched):
            raise SpqrError(
                "--dry-run estimates one run in one process: leave out --near-lossless, --target-bits, --target-size "
                "and --distributed"
            )

    def config(self, default: SpqrConfig = COMPACT) -> SpqrConfig:
        """The configuration: the preset, with the settings that are set.

        Args:
          default: configuration without a preset.

        Example:
          >>> Settings(preset=Preset.SMALL, bits=4).config().bits
          4
        """
        start = default if self.preset is None else PRESETS[self.preset]
        return self.method.config(replace(start, **self.fields))
