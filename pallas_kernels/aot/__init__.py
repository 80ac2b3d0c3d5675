"""What kernels will cost on a GPU, found on any machine by compiling them for it.

`make aot-env` installs what it needs, `python -m pallas_kernels.aot` prints it.
"""

from pallas_kernels.aot.costs import KernelReport, report, report_all
from pallas_kernels.aot.formats import Format
from pallas_kernels.aot.gpus import GPUS, Gpu

__all__ = ["GPUS", "Format", "Gpu", "KernelReport", "report", "report_all"]
