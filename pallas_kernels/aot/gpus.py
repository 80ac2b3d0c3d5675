"""The GPUs that can be compiled for, and what they reach.

The descriptions in `data` are what XLA's compiler asks a present GPU for. Beside them stand the numbers that times
are predicted from:

* Instruction rate: streaming multiprocessors × 4 schedulers × 32 threads × clock. Multiprocessors and the boost clock
  are from NVIDIA's data sheets; an H100 under full load keeps less than its boost of 1.98 GHz, an A100 and an RTX 4090
  keep theirs.
* Bandwidth: the data sheet's (3.35, 2.04 and 1.01 TB/s) times about 0.9, what copies of large arrays reach.
* Tensor cores: the data sheet's, of bfloat16 with sums in float32, without sparsity.
"""

from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Gpu:
    """A GPU to compile for.

    Attributes:
      description: file in `data`, a `GpuTargetConfigProto` of XLA in text form.
      instruction_rate: instructions of single threads that it issues in a second, all of it busy.
      bandwidth: bytes that it reads or writes in a second.
      tensor_rate: additions and multiplications of its tensor cores in a second.
      parameters: where the parameters of a kernel begin in the constant bank 0.
    """

    description: str
    instruction_rate: float
    bandwidth: float
    tensor_rate: float
    parameters: int

    def text(self) -> str:
        """The description itself."""
        return files("pallas_kernels.aot").joinpath("data", self.description).read_text()


GPUS = {
    "h100": Gpu("h100_sxm.txtpb", 132 * 4 * 32 * 1.72e9, 3.0e12, 989e12, 0x210),
    "a100": Gpu("a100_sxm_80.txtpb", 108 * 4 * 32 * 1.41e9, 1.8e12, 312e12, 0x160),
    "rtx4090": Gpu("rtx4090.txtpb", 128 * 4 * 32 * 2.52e9, 0.92e12, 165e12, 0x160),
}
