"""The packed SpQR format and the operations on it; usable without the rest of the library."""

from pallas_kernels.dequantize import spqr_dequantize, spqr_take
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.columns import split_columns
from pallas_kernels.format.outliers import Outliers
from pallas_kernels.format.rows import concatenate_rows, join_rows, split_rows
from pallas_kernels.format.tensor import (
    QuantizedStatistics,
    SpqrTensor,
    bits_per_weight,
    check_format,
    outlier_share,
    pack,
    trim,
)
from pallas_kernels.matmul import spqr_matmul
from pallas_kernels.sharded import SplitTensor, split_matmul, split_take

__all__ = [
    "Outliers",
    "QuantizedStatistics",
    "SplitTensor",
    "SpqrError",
    "SpqrTensor",
    "bits_per_weight",
    "check_format",
    "concatenate_rows",
    "join_rows",
    "outlier_share",
    "pack",
    "split_columns",
    "split_matmul",
    "split_rows",
    "split_take",
    "spqr_dequantize",
    "spqr_matmul",
    "spqr_take",
    "trim",
]
