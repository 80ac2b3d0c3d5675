"""The walk of calibration sequences over blocks and stages, which yields the moments of each distinct input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Block, Decoder, Params, layer_name
from spqr_jax.models.experts import matrix_names, with_kernels
from spqr_jax.quantization.checks import check_hidden, check_tokens, check_weights
from spqr_jax.quantization.expert_moments import ExpertMoments
from spqr_jax.quantization.hidden_states import Streams, advance, embed
from spqr_jax.quantization.moments import InputMoments
from spqr_jax.rules import Plan
from spqr_jax.runtime.placement import ONE_DEVICE, Placement
from spqr_jax.runtime.x64 import steps_in_32_bits


class SharedInput:
    """A distinct input of a block, which one or more matrices multiply.

    Attributes:
      matrices: their names, in order of use, see `experts.matrix_names`.
      pooled: whether the moments are those of all experts, because this one has got too few tokens.
    """

    def __init__(
        self, matrices: tuple[str, ...], moments: InputMoments, pooled: bool | Bool[Array, ""] = False
    ) -> None:
        self.matrices, self.pooled = matrices, pooled
        self._moments = [moments]

    def only(self, matrices: tuple[str, ...]) -> "SharedInput":
        """The input for some of its matrices; it has the moments from now on."""
        return SharedInput(matrices, self.take_moments(), self.pooled)

    def take_moments(self) -> InputMoments:
        """Hands the moments over, once; they may be larger than the weights, and are freed with the caller's name."""
        return self._moments.pop()


class BlockWalk:
    """Takes calibration sequences through one block, stage by stage, and yields each distinct input on the way.

    Args:
      block: the block, see `Decoder.new_block`.
      params: its parameters, dense.
      streams: hidden states before it.
      placement: devices that share the sequences, and memory for the hidden states.
      sequential: later stages run with the kernels that `replace` gave; otherwise only the output of the block does.

    Example:
      >>> streams = Streams({"hidden": embed(model, params, calibration)}, None)
      >>> walk = BlockWalk(model.new_block(), params["layers_0"], streams)
      >>> [shared.matrices for shared in walk]
      [('q_proj', 'k_proj', 'v_proj'), ('o_proj',), ('gate_proj', 'up_proj'), ('down_proj',)]
      >>> walk.finish().quantized["hidden"].shape
      (4, 64, 64)
    """

    def __init__(
        self,
        block: Block,
        params: Params,
        streams: Streams,
        placement: Placement = ONE_DEVICE,
        *,
        sequential: bool = True,
    ) -> None:
        self._block, self._placement, self._sequential = block, placement, sequential
        self._dtype = streams.quantized["hidden"].dtype
        # Kernels in the type of the hidden states: converted once here, not for every batch.
        kernels = {matrix: params[matrix]["kernel"].astype(self._dtype) for matrix in block.matrices()}
        self._original = with_kernels(params, kernels)
        self._running = self._original
        self._replaced: dict[str, Float[Array, "in out"]] = {}
        self._streams = streams
        self._before = None if sequential else streams

    def __iter__(self) -> Iterator[SharedInput]:
        for number, stage in enumerate(self._block.stages):
            running = self._quantized() if self._sequential else self._original
            moments = self._advance(number, running)
            for feed, layers in stage.feeds.items():
                names = [matrix_names(layer, self._block.experts().get(layer)) for layer in layers]
                yield from _inputs(names, moments.pop(feed))

    def replace(self, weights: dict[str, Float[Array, "out in"]]) -> None:
        """Takes the dequantized weights of matrices, by name, out of a dict: each is freed once it is converted."""
        for matrix in tuple(weights):
            self._replaced[matrix] = _as_kernel(weights.pop(matrix), self._dtype)

    def finish(self) -> Streams:
        """The hidden states after the block, with the replaced kernels; call it once, after the iteration."""
        if self._before is not None:
            self._streams, self._before = self._before, None
            running = self._quantized()
            for number in range(len(self._block.stages)):
                self._advance(number, running)
        return self._streams

    def _quantized(self) -> Params:
        """The parameters with all kernels replaced so far."""
        self._running = with_kernels(self._running, self._replaced)
        self._replaced = {}
        return self._running

    def _advance(self, number: int, running: Params) -> dict[str, InputMoments | ExpertMoments]:
        self._streams, moments = advance(self._block, number, running, self._original, self._streams, self._placement)
        return moments


@steps_in_32_bits
def walk_original(
    model: Decoder,
    parts: Mapping[str, Callable[[], Params]],
    calibration_tokens: Int[ArrayLike, "sequences tokens"],
    config: SpqrConfig,
) -> Iterator[tuple[int, Params, SharedInput]]:
    """Walks over all blocks of an original, unquantized model, with one block's weights in memory at a time.

    Args:
      model: the Flax module.
      parts: readers of the top-level entries of the parameter tree, see `ModelSource`.
      calibration_tokens: token ids of sequences of equal length.
      config: what the weights are checked against.

    Returns:
      For each distinct input, in order: the index of its block, the block's parameters in float32, and the input.

    Raises:
      SpqrError: a weight or the tokens cannot be used, or the output of a block is not finite; the message names which
        and why.

    Example:
      >>> inputs = list(walk_original(source.model, source.parts, calibration, COMPACT))
      >>> [shared.matrices for depth, params, shared in inputs if depth == 1]
      [('q_proj', 'k_proj', 'v_proj'), ('o_proj',), ('gate_proj', 'up_proj'), ('down_proj',)]
    """
    tokens = np.asarray(calibration_tokens)
    first = parts[layer_name(0)]()
    check_weights({layer_name(0): first}, model, Plan(config))
    check_tokens(tokens, first, model)
    del first
    streams = [Streams({"hidden": embed(model, {"embed_tokens": parts["embed_tokens"]()}, tokens)}, None)]
    for depth in range(model.config.num_layers):
        part = parts[layer_name(depth)]()
        check_weights({layer_name(depth): part}, model, Plan(config))
        params = jax.tree.map(ONE_DEVICE.put_parameter, part)
        del part
        walk = BlockWalk(model.new_block(depth), params, streams.pop())
        for shared in walk:
            yield depth, params, shared
        streams.append(walk.finish())
        check_hidden(streams, layer_name(depth))


def _inputs(names: Sequence[tuple[str, ...]], moments: InputMoments | ExpertMoments) -> Iterator[SharedInput]:
    """The inputs of layers that share one: a single one, or one for each expert.

    Args:
      names: of each layer's matrices.
      moments: of the input.
    """
    for index, matrices in enumerate(zip(*names, strict=True)):
        yield SharedInput(matrices, *((moments,) if isinstance(moments, InputMoments) else moments.of(index)))


@partial(jax.jit, static_argnames="dtype")
def _as_kernel(weight: Float[Array, "out in"], dtype: DTypeLike) -> Float[Array, "in out"]:
    return weight.T.astype(dtype)
