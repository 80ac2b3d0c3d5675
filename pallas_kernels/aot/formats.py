"""Short names for packed formats, and the shapes of matrices packed in them."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.outliers import Outliers
from pallas_kernels.format.tensor import SpqrTensor, check_format

_SPELLING = re.compile(r"(\d+)b-g(\d+)(?:-s(\d+))?(?:-o(\d+(?:\.\d+)?)%)?")


@dataclass(frozen=True)
class Format:
    """A packed format with statistics groups of 16 rows and a permutation.

    The spelling `3b-g16-s3-o2%` means 3 bits, groups of 16, 3-bit statistics and 2 % outliers. Without `-s3` the
    statistics are float16, and without `-o2%` there are no outliers.

    Attributes:
      bits: width of a weight code.
      group_size: consecutive columns that share a scale and a zero.
      stats_bits: width of the codes of scales and zeros. None: they are stored as float16.
      outlier_percent: percentage of the weights that are outliers.
    """

    bits: int
    group_size: int
    stats_bits: int | None = None
    outlier_percent: float = 0.0

    @classmethod
    def parse(cls, spelling: str) -> "Format":
        """Parses a spelling.

        Raises:
          SpqrError: the spelling is not of the form above.

        Example:
          >>> Format.parse("4b-g16-s3-o0.5%")
          Format(bits=4, group_size=16, stats_bits=3, outlier_percent=0.5)
        """
        match = _SPELLING.fullmatch(spelling)
        if match is None:
            raise SpqrError(
                f"{spelling!r} is not a format; write 3b-g16-s3-o2% for 3 bits, groups of 16, 3-bit statistics and "
                "2 % outliers, or leave out the last two parts"
            )
        bits, group_size, stats_bits, outlier_percent = match.groups()
        return cls(int(bits), int(group_size), int(stats_bits) if stats_bits else None, float(outlier_percent or 0))

    def __str__(self) -> str:
        statistics = "" if self.stats_bits is None else f"-s{self.stats_bits}"
        outliers = f"-o{self.outlier_percent:g}%" if self.outlier_percent else ""
        return f"{self.bits}b-g{self.group_size}{statistics}{outliers}"

    def tensor(self, shape: tuple[int, int]) -> SpqrTensor:
        """A matrix of shape (out, in) whose arrays are `jax.ShapeDtypeStruct`s.

        Raises:
          SpqrError: the format does not support these sizes.

        Example:
          >>> Format.parse("3b-g16-s3-o2%").tensor((4096, 11008)).scale_codes.shape
          (3, 256, 688)
        """
        out, columns = shape
        bits, stats_bits = self.bits, self.stats_bits
        check_format(out, columns, bits=bits, group_size=self.group_size, scale_bits=stats_bits, zero_bits=stats_bits)
        tensor: SpqrTensor = jax.eval_shape(lambda: self._zeros(out, columns))
        return tensor

    def _zeros(self, out: int, columns: int) -> SpqrTensor:
        blocks, groups = -(-columns // BLOCK), columns // self.group_size
        count = round(out * columns * self.outlier_percent / 100)
        zeros = jnp.zeros
        return SpqrTensor(
            codes=zeros((self.bits, out, -(-blocks // 2)), jnp.uint32),
            **self._statistics("scale", out, groups),
            **self._statistics("zero", out, groups),
            outliers=Outliers(zeros(out + 1, jnp.int32), zeros(count, jnp.uint16), zeros(count, jnp.float16))
            if count
            else None,
            permutation=zeros(columns, jnp.uint16),
            in_features=columns,
            group_size=self.group_size,
        )

    def _statistics(self, name: str, out: int, groups: int) -> dict[str, Array | None]:
        """The four fields of `SpqrTensor` that hold the scales, or the zeros."""
        if self.stats_bits is None:
            fields = {f"{name}_codes": None, f"{name}_scale": None, f"{name}_zero": None}
            return {name: jnp.zeros((out, groups), jnp.float16), **fields}
        second = jnp.zeros((out // BLOCK, groups), jnp.float16)
        codes = jnp.zeros((self.stats_bits, out // BLOCK, groups), jnp.uint16)
        return {name: None, f"{name}_codes": codes, f"{name}_scale": second, f"{name}_zero": second}
