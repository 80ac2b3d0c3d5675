"""Packed formats by short names, and packed matrices without content."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.errors import SpqrError
from pallas_kernels.format.bit_layout import BLOCK
from pallas_kernels.format.outliers import Outliers
from pallas_kernels.format.tensor import SpqrTensor, check_format

_SPELLING = re.compile(r"(\d+)b-g(\d+)(?:-s(\d+))?(?:-o(\d+(?:\.\d+)?)%)?")


@dataclass(frozen=True)
class Format:
    """What a matrix is packed as; statistics groups have 16 rows, and there is a permutation.

    Spelled `3b-g16-s3-o2%`: 3 bits, groups of 16, statistics of 3 bits (without `-s3`: of 16 bits), 2 % of all weights
    outliers (without `-o2%`: none).

    Attributes:
      bits: width of a weight code.
      group_size: consecutive columns that share a scale and a zero.
      stats_bits: width of the codes of scales and zeros, None where these are not quantized.
      outlier_percent: share of weights that are outliers.
    """

    bits: int
    group_size: int
    stats_bits: int | None = None
    outlier_percent: float = 0

    @classmethod
    def parse(cls, spelling: str) -> "Format":
        """The format of this spelling.

        Raises:
          SpqrError: nothing is spelled so.

        Example:
          >>> Format.parse("4b-g16-s3-o0.5%")
          Format(bits=4, group_size=16, stats_bits=3, outlier_percent=0.5)
        """
        match = _SPELLING.fullmatch(spelling)
        if match is None:
            raise SpqrError(
                f"{spelling!r} is not a format; one of 3 bits, groups of 16, statistics of 3 bits and 2 % outliers is "
                "3b-g16-s3-o2%, and the last two parts can be left out"
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
          SpqrError: the format does not support these sizes; the message says which.
        """
        out, columns = shape
        bits, stats_bits = self.bits, self.stats_bits
        check_format(out, columns, bits=bits, group_size=self.group_size, scale_bits=stats_bits, zero_bits=stats_bits)
        blocks, groups = -(-columns // BLOCK), columns // self.group_size
        count = round(out * columns * self.outlier_percent / 100)

        def array(dtype: type, *sizes: int, present: bool = True) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype) if present else None

        quantized = stats_bits is not None
        plain = array(jnp.float16, out, groups, present=not quantized)
        planes = array(jnp.uint16, stats_bits or 0, out // BLOCK, groups, present=quantized)
        second = array(jnp.float16, out // BLOCK, groups, present=quantized)
        sparse = Outliers(array(jnp.int32, out + 1), array(jnp.uint16, count), array(jnp.float16, count))
        return SpqrTensor(
            codes=array(jnp.uint32, bits, out, -(-blocks // 2)),
            **{"scale": plain, "scale_codes": planes, "scale_scale": second, "scale_zero": second},
            **{"zero": plain, "zero_codes": planes, "zero_scale": second, "zero_zero": second},
            outliers=sparse if count else None,
            permutation=array(jnp.uint16, columns),
            in_features=columns,
            group_size=self.group_size,
        )
