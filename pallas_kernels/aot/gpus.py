"""The GPUs that kernels can be compiled for, and their peak rates.

The files in `data` describe each GPU to XLA's compiler, which would otherwise query the device. Predicted times use:

* Instruction rate: streaming multiprocessors × 4 schedulers × 32 threads × clock. Multiprocessors and boost clock
  are from NVIDIA's data sheets. Under full load an H100 runs below its boost clock of 1.98 GHz, so it has 1.72 GHz
  here. An A100 and an RTX 4090 sustain theirs.
* Bandwidth: about 0.9 of the data sheet's 3.35, 2.04 and 1.01 TB/s, as copies of large arrays reach.
* Tensor cores: the data sheet's rate for bfloat16 with float32 sums, without sparsity.
"""

from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Gpu:
    """A GPU to compile for.

    Attributes:
      description: file in `data`, XLA's `GpuTargetConfigProto` in text form.
      instruction_rate: instructions issued per second, counted per thread, with all schedulers busy.
      bandwidth: bytes read or written per second.
      tensor_rate: additions and multiplications of the tensor cores per second.
      parameters: byte offset of a kernel's parameters in constant bank 0.
    """

    description: str
    instruction_rate: float
    bandwidth: float
    tensor_rate: float
    parameters: int

    def text(self) -> str:
        """Reads the description."""
        return files("pallas_kernels.aot").joinpath("data", self.description).read_text()


GPUS = {
    "h100": Gpu("h100_sxm.txtpb", 132 * 4 * 32 * 1.72e9, 3.0e12, 989e12, 0x210),
    "a100": Gpu("a100_sxm_80.txtpb", 108 * 4 * 32 * 1.41e9, 1.8e12, 312e12, 0x160),
    "rtx4090": Gpu("rtx4090.txtpb", 128 * 4 * 32 * 2.52e9, 0.92e12, 165e12, 0x160),
}
