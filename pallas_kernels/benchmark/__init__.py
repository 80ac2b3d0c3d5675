"""The benchmark of products with packed matrices against the alternatives that a user has.

`python -m pallas_kernels.benchmark` measures on the present GPU. Without one it predicts, and labels the times so.
"""

from pallas_kernels.benchmark.matrices import random_matrix
from pallas_kernels.benchmark.timing import Timing, bandwidth, seconds_per_call

__all__ = ["Timing", "bandwidth", "random_matrix", "seconds_per_call"]
