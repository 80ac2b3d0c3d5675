"""Predicts the cost of kernels on a GPU by compiling them ahead of time (AOT); no GPU is needed.

`make aot-env` installs the compilers. `python -m pallas_kernels.aot` prints the report.
"""

from pallas_kernels.aot.costs import KernelReport, report, report_all
from pallas_kernels.aot.formats import Format
from pallas_kernels.aot.gpus import GPUS, Gpu

__all__ = ["GPUS", "Format", "Gpu", "KernelReport", "report", "report_all"]
