"""What products with packed matrices take on the GPU that is there, beside what a user would take instead.

`python -m pallas_kernels.benchmark` measures and prints it. Where there is no GPU, times are predicted, and say so.
"""

from pallas_kernels.benchmark.matrices import random_matrix
from pallas_kernels.benchmark.timing import Timing, bandwidth, seconds_per_call

__all__ = ["Timing", "bandwidth", "random_matrix", "seconds_per_call"]
