"""Decoding of random models, measured on any device, and compiled ahead of time for a GPU."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.ahead_of_time import needs_compiler
from typer.testing import CliRunner

from pallas_kernels import SpqrTensor
from pallas_kernels.aot import GPUS, Format
from pallas_kernels.aot.compiler import Program, compile_program, run_apart
from pallas_kernels.aot.hlo import accessed_bytes, parse_program
from pallas_kernels.benchmark.matrices import random_matrix
from spqr_jax import generation
from spqr_jax.benchmark import __main__ as command
from spqr_jax.benchmark import decode, predicted
from spqr_jax.benchmark.random_model import MODELS, fused_shapes, random_params
from spqr_jax.benchmark.results import read
from spqr_jax.generation import Policy
from spqr_jax.models.decoder import Params
from spqr_jax.models.fusion import fuse_projections
from spqr_jax.models.stacked_blocks import stack_blocks

FORM = Format.parse("3b-g16-s3-o1%")
TINY = MODELS["tiny"]
FORMS = pytest.mark.parametrize("form", [FORM, None], ids=str)


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@FORMS
@pytest.mark.slow
def test_random_models_are_in_the_form_that_is_decoded(form):
    params = random_params(TINY, form)
    assert fuse_projections(params, TINY) == params
    for name, shape in fused_shapes(TINY).items():
        kernels = [params[f"layers_{index}"][name]["kernel"] for index in range(2)]
        assert {isinstance(kernel, SpqrTensor) for kernel in kernels} == {form is not None}
        assert {kernel.shape for kernel in kernels} == {shape if form else shape[::-1]}
        assert not np.array_equal(*(jax.tree.leaves(kernel)[0] for kernel in kernels))
    assert fused_shapes(TINY)["q_proj+k_proj+v_proj"] == (192, 64)


@FORMS
@pytest.mark.slow
def test_a_step_block_by_block_gives_the_logits_of_the_stack(form):
    model = TINY.clone(dtype=jnp.float32)
    params = random_params(model, form)
    forward = jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 5)).astype(np.int32)
    results = []
    for one in (params, stack_blocks(params)):
        cache = model.init_cache(one, batch=2, slots=8)
        _, cache = forward(one, tokens[:, :4], cache)
        logits, cache = forward(one, tokens[:, 4:], cache)
        results.append(np.asarray(logits))
    assert np.ptp(results[0]) > 0.1
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4 * np.abs(results[1]).max())


@pytest.mark.slow
def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "measured_rows", functools.partial(decode.measured_rows, batches=(2,), prefixes=(0,)))
    path = tmp_path / "decode.json"
    done = CliRunner().invoke(command.app, ["--decode", "--model", "tiny", "--output", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    results = read(path)
    assert (results.measured, results.device, results.model) == (True, jax.devices()[0].device_kind, "tiny")
    assert results.versions["jax"] == jax.__version__
    packed, dense = results.rows
    assert (packed.weights, dense.weights) == ("3b-g16-s3-o1%", "bfloat16")
    for row, form in ((packed, FORM), (dense, None)):
        assert (row.batch, row.prefix, row.skipped, row.launches) == (2, 0, None, None)
        assert row.weight_bytes == nbytes(random_params(TINY, form))
        # Keys and values, 2 blocks, 2 sequences, 64 + 128 slots, 64 features, 4 bytes on a CPU.
        assert row.cache_bytes == 2 * 2 * 2 * 192 * 64 * 4
        assert row.first_token_seconds > 0
        assert row.step_quartiles[0] <= row.step_seconds <= row.step_quartiles[1]
        assert min(row.products_seconds, row.attention_seconds) > 0
        assert row.products_seconds + row.attention_seconds + row.rest_seconds == pytest.approx(row.step_seconds)
        assert row.tokens_per_second * row.step_seconds == pytest.approx(1)
        assert row.tokens_per_second_in_all == pytest.approx(2 * row.tokens_per_second)


@pytest.mark.slow
def test_what_does_not_fit_is_skipped_with_the_numbers(monkeypatch):
    packed, dense = (nbytes(random_params(TINY, form)) for form in (FORM, None))
    limit = dense + decode.empty_row(TINY, None, batch=1, prefix=0).cache_bytes
    monkeypatch.setattr(decode, "memory_limit", lambda: limit)
    monkeypatch.setattr(decode, "_measured", lambda model, params, row, products: row)
    monkeypatch.setattr(decode, "products_seconds", lambda *args: 1.0)
    assert packed < dense
    rows = list(decode.measured_rows(TINY, (FORM, None), batches=(1,), prefixes=(0,)))
    assert [row.skipped for row in rows] == [None, "0.0 GB of weights and 0.0 GB of cache do not fit into 0.0 GB"]


def test_nothing_starts_after_the_deadline():
    assert list(decode.measured_rows(TINY, (FORM, None), deadline=-1.0)) == []


@pytest.mark.parametrize("arguments", [["--model", "llama-8b"], ["--seconds", "long"]])
def test_wrong_usage(arguments):
    assert CliRunner().invoke(command.app, ["--decode", *arguments]).exit_code == 2


HLO = """
%in_place (param_0: bf16[4,1024], param_1: bf16[4,1], param_2: s32[]) -> bf16[4,1024] {
  %param_0 = bf16[4,1024]{1,0} parameter(0)
  %param_1 = bf16[4,1]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %bitcast.1 = bf16[4,1024]{1,0} bitcast(%param_0)
  ROOT %update = bf16[4,1024]{1,0} dynamic-update-slice(%bitcast.1, %param_1, %zero, %param_2)
}

%rows (param_3: f32[100,8], param_4: s32[2,1]) -> (f32[2,8], f32[2]) {
  %param_3 = f32[100,8]{1,0} parameter(0)
  %param_4 = s32[2,1]{1,0} parameter(1)
  %found = f32[2,8]{1,0} gather(%param_3, %param_4), offset_dims={1}
  %sums = f32[2]{0} reduce(%found, %param_4), dimensions={1}
  ROOT %both = (f32[2,8]{1,0}, f32[2]{0}) tuple(%found, %sums)
}

%written_and_read (param_5: f32[4,16], param_6: f32[4,1], param_7: s32[]) -> f32[4] {
  %param_5 = f32[4,16]{1,0} parameter(0)
  %param_6 = f32[4,1]{1,0} parameter(1)
  %param_7 = s32[] parameter(2)
  %new = f32[4,16]{1,0} dynamic-update-slice(%param_5, %param_6, %param_7, %param_7)
  ROOT %row_sums = f32[4]{0} reduce(%new, %param_7), dimensions={1}
}

ENTRY %main (cache: bf16[4,1024], last: bf16[4,1], at: s32[], table: f32[100,8], ids: s32[2,1]) -> bf16[4,1024] {
  %cache = bf16[4,1024]{1,0} parameter(0)
  %last = bf16[4,1]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %table = f32[100,8]{1,0} parameter(3)
  %ids = s32[2,1]{1,0} parameter(4)
  %looked_up = (f32[2,8]{1,0}, f32[2]{0}) fusion(%table, /*index=1*/%ids), kind=kLoop, calls=%rows
  %some = f32[4,16]{1,0} custom-call(), custom_call_target="any"
  %column = f32[4,1]{1,0} custom-call(), custom_call_target="any"
  %summed = f32[4]{0} fusion(%some, %column, %at), kind=kInput, calls=%written_and_read
  %whole = bf16[4,1024]{1,0} custom-call(%cache, %at), custom_call_target="any"
  ROOT %written = bf16[4,1024]{1,0} fusion(%whole, %last, %at), kind=kLoop, calls=%in_place
}
"""


def test_bytes_of_instructions():
    program = parse_program(HLO)
    assert (program["written"].root, program["written"].computation) == (True, "main")
    assert accessed_bytes(program, "written") == 8 + 4 + 8
    assert accessed_bytes(program, "looked_up") == (64 + 8) + (64 + 8)
    assert accessed_bytes(program, "summed") == (256 + 16 + 4) + 16
    assert accessed_bytes(program, "whole") == 8192 + 4 + 8192


def test_missing_kernels_are_an_error():
    row = decode.empty_row(TINY, None, batch=1, prefix=0)
    with pytest.raises(ValueError, match="kernels access 1000 bytes, fewer than"):
        predicted._predicted(row, predicted.Step(20, 0, 1000), [], TINY, GPUS["h100"])


SETTINGS = [(1, FORM), (1, None)]
LLAMA = MODELS["llama-7b"]
TWO_BLOCKS = LLAMA.clone(config=dataclasses.replace(LLAMA.config, num_layers=2))


@pytest.fixture(scope="module")
def programs():
    """The decode loop of two blocks of LLaMA-7B's shape after 1024 tokens, compiled for an H100."""
    compiled = functools.partial(predicted.compiled_decode, TWO_BLOCKS, GPUS["h100"], prefix=1024)
    return dict(zip(SETTINGS, run_apart(compiled, *zip(*SETTINGS, strict=True)), strict=True))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_weights_and_caches_are_read_where_they_are(programs, setting):
    batch, form = setting
    program = programs[setting]
    largest = max(
        (one.nbytes for one in parse_program(program.hlo).values() if one.opcode.startswith("copy")), default=0
    )
    assert largest < 1e6
    assert sum(kernel.accessed_bytes for kernel in program.kernels if not kernel.in_loop) < 1e6
    step = [kernel for kernel in program.kernels if kernel.in_loop]
    others = sum(kernel.accessed_bytes for kernel in step if not kernel.name.startswith(predicted.OURS))
    # The other kernels read the cache and the dense weights once, and little else.
    least = decode.empty_row(TWO_BLOCKS, form, batch, 1024, "gpu").cache_bytes + 2 * 32000 * 4096
    if form is None:
        least += sum(2 * 2 * out * columns for out, columns in fused_shapes(TWO_BLOCKS).values())
    assert least <= others <= 1.1 * least


@pytest.mark.slow
@needs_compiler
def test_kernels_of_a_block(programs):
    for (_, form), program in programs.items():
        names = [kernel.name for kernel in program.kernels if kernel.in_loop]
        # Four products with two kernels each.
        assert sum(name.startswith(predicted.OURS) for name in names) == (2 * 8 if form else 0)
        assert len(names) < 2 * 30 + 20


ENDS = Format.parse("8b-g64-s8-o0%")
TIED = TWO_BLOCKS.clone(config=dataclasses.replace(LLAMA.config, num_layers=2, tie_embeddings=True))


def compiled_with_packed_embedding(batch: int) -> Program:
    """The decode loop of a tied model whose embedding is packed."""

    def packed() -> Params:
        params = random_params(TIED, FORM)
        table = random_matrix(ENDS, (LLAMA.config.vocab_size, LLAMA.config.hidden_size), 0)
        return params | {"embed_tokens": {"embedding": table}}

    params = jax.eval_shape(packed)
    state = jax.eval_shape(lambda: decode.start(TIED, params, batch, 1024, "gpu")[0])
    function = jax.jit(functools.partial(generation.decode, TIED, Policy()), donate_argnums=1)
    return compile_program(function, params, state, jax.ShapeDtypeStruct((), jnp.int32), gpu=GPUS["h100"])


@pytest.mark.slow
@needs_compiler
def test_a_packed_embedding_is_read_once_as_the_head_and_by_rows_as_the_embedding():
    for batch, program in zip((1, 16), run_apart(compiled_with_packed_embedding, (1, 16)), strict=True):
        step = [kernel for kernel in program.kernels if kernel.in_loop]
        ours = [kernel for kernel in step if kernel.name.startswith(predicted.OURS)]
        assert len(ours) > 2 * 8
        others = sum(kernel.accessed_bytes for kernel in step) - sum(kernel.accessed_bytes for kernel in ours)
        cache = decode.empty_row(TIED, FORM, batch, 1024, "gpu").cache_bytes
        # Unpacking all of the table would read its 131 MB of codes.
        assert others < 1.1 * cache + 0.25 * 32000 * 4096
