"""The public names of `spqr_jax`, which imports this module when one of them is first used."""
# ruff: noqa: F401

from pallas_kernels import SpqrError, SpqrTensor, bits_per_weight, spqr_dequantize
from spqr_jax.config import COMPACT, NEAR_LOSSLESS, SMALL, SpqrConfig
from spqr_jax.generation import generate
from spqr_jax.measure.perplexity import perplexity
from spqr_jax.models import fuse_projections, shard_params
from spqr_jax.quantization.model import quantize, quantize_blocks
from spqr_jax.quantization.report import MatrixReport
from spqr_jax.quantization.solver import quantize_matrix
from spqr_jax.storage.checkpoint import CheckpointError, load, open_checkpoint, save
from spqr_jax.storage.disk_to_disk import quantize_checkpoint
from spqr_jax.storage.totals import summarize
