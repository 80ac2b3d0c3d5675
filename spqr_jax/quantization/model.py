"""Quantizing a whole model: its blocks in order, each on what the quantized blocks before it give.

Source: Dettmers et al. 2023 (arXiv 2306.03078), section 4; the order inside a block is the official code's
`--true-sequential`. It costs one forward pass per block here, because a stage ends where its matrices have their input.
"""

from collections.abc import Iterator

from jax.sharding import Mesh
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from pallas_kernels.errors import SpqrError
from spqr_jax.config import Rules, SpqrConfig
from spqr_jax.models.decoder import Decoder, Params, layer_name
from spqr_jax.models.stacked_blocks import unstack_blocks
from spqr_jax.quantization.block import QuantizedBlock, quantize_block
from spqr_jax.quantization.checks import check_shares, check_tokens, check_weights
from spqr_jax.quantization.ends import quantize_end
from spqr_jax.quantization.hidden_states import embed, start
from spqr_jax.quantization.report import MatrixReport
from spqr_jax.rules import Plan
from spqr_jax.runtime.placement import Placement
from spqr_jax.runtime.tracing import is_traced
from spqr_jax.runtime.x64 import in_32_bits, steps_in_32_bits
from spqr_jax.texts import calibration_sequences


@in_32_bits
def quantize(
    params: Params,
    calibration_tokens: ArrayLike | None,
    *,
    model: Decoder,
    config: SpqrConfig,
    rules: Rules = (),
    mesh: Mesh | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Params, dict[str, MatrixReport]]:
    """Quantizes every matrix of the decoder blocks and, with `embedding_bits`, the embedding and the head.

    A pure function of its arrays. Under `jax.jit` all blocks are compiled, which suits small models. The outlier arrays
    then keep room for every weight, and `pallas_kernels.trim` cuts them afterwards.

    Args:
      params: parameter tree of `model`, dense.
      calibration_tokens: token ids `[sequences, tokens]`; None rounds to nearest. Strings, or lists of ids of unequal
        length, are packed into sequences, see `texts.calibration_sequences`.
      model: the Flax module. Calibration runs in its type, or in bfloat16 for float16, see `hidden_states.embed`.
      config: what to quantize to.
      rules: changes of `config` for some matrices, such as `[("layers_0.*", {"bits": 8}), ("*.down_proj", None)]`; the
        first pattern that matches a name decides, and None leaves its matrices dense.
      mesh: devices that share the work, all axes as one. Each takes its share of the calibration sequences, and of the
        rows of each matrix. H and its factor are whole on every device. Not under `jax.jit`.
      tokenizer: of calibration texts that are strings.

    Returns:
      The tree with an `SpqrTensor` in the place of each quantized kernel.
      A report per matrix (`layers_3.q_proj`, `embed_tokens`).

    Raises:
      SpqrError: sizes that do not fit the format, values that are not finite, token ids outside the vocabulary, too
        few tokens, sequences that the devices cannot share evenly, or a rule that cannot be or matches nothing. The
        message names the tensor and the numbers.

    Source: Dettmers et al. 2023 (arXiv 2306.03078), section 4.

    Example:
      >>> quantized, report = quantize(params, calibration, model=model, config=COMPACT)
      >>> quantized["layers_0"]["q_proj"]["kernel"].bits
      4
      >>> report["layers_0.q_proj"].relative_error < 0.02
      True
    """
    quantized = dict(unstack_blocks(params))
    report: dict[str, MatrixReport] = {}
    for block in quantize_blocks(
        params, calibration_tokens, model=model, config=config, rules=rules, mesh=mesh, tokenizer=tokenizer
    ):
        quantized[block.name] = block.params
        report |= block.report
    return quantized, report


@steps_in_32_bits
def quantize_blocks(
    params: Params,
    calibration_tokens: ArrayLike | None,
    *,
    model: Decoder,
    config: SpqrConfig,
    rules: Rules = (),
    mesh: Mesh | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[QuantizedBlock]:
    """Yields a model's blocks as `quantize` finishes them, then embedding and head if they are quantized.

    Arguments and errors are those of `quantize`.

    Example:
      >>> for block in quantize_blocks(params, calibration, model=model, config=COMPACT):
      ...     print(block.name, len(block.report))
      layers_0 7
      layers_1 7
      embed_tokens 1
      lm_head 1
    """
    if mesh is not None and is_traced((params, calibration_tokens)):
        raise SpqrError("with a mesh, quantize cannot be traced: call it outside jax.jit, it compiles its parts itself")
    placement = Placement(mesh)
    params = unstack_blocks(params)
    plan = Plan.of(config, rules).checked(model)
    check_weights(params, model, plan)
    streams = None
    if calibration_tokens is not None:
        tokens = calibration_sequences(calibration_tokens, model.config.max_positions, tokenizer)
        check_tokens(tokens, params[layer_name(0)], model)
        check_shares(len(tokens), placement)
        streams = start(embed(model, params, tokens), config)
    for index in range(model.config.num_layers):
        name = layer_name(index)
        finished, streams = quantize_block(model.new_block(index), name, params[name], streams, plan, placement)
        yield finished
    for name in plan.ends(model):
        yield quantize_end(model, name, params, streams, plan, placement)
