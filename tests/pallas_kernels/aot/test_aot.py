import itertools
import json
import subprocess
import sys
from collections.abc import Callable

import jax
import pytest
from helpers.ahead_of_time import needs_compiler
from typer.testing import CliRunner

from pallas_kernels.aot import GPUS, Format, compiler, report_all
from pallas_kernels.aot.__main__ import app
from pallas_kernels.aot.kernels import COMPILED
from pallas_kernels.aot.pointers import loaded_parameters
from pallas_kernels.aot.sass import loops, parse, reachable, through


def listing(*lines: str):
    """Parses instructions, and labels, which end in a colon."""
    return parse(
        "\n".join(line if line.endswith(":") else f"        /*{i * 16:04x}*/  {line} ;" for i, line in enumerate(lines))
    )


LOOP = listing(
    "LDC.64 R2, c[0x0][0x218]",
    ".L_x_1:",
    "@!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10]",
    "FFMA R8, R4, R5.reuse, R8",
    "@P1 BRA `(.L_x_1)",
    "BRA `(.L_x_3)",
    ".L_x_2:",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_2)",
    ".L_x_4:",
    "BRA `(.L_x_4)",
    "NOP",
)


def test_what_pads_a_program_is_not_counted():
    assert reachable(LOOP) == [0, 1, 2, 3, 4, 6, 5]


def test_a_branch_back_is_a_loop_only_around_what_leads_to_it():
    assert loops(LOOP) == [frozenset({1, 2, 3})]


def test_ways_through_an_instruction():
    forked = listing("NOP", "@P0 BRA `(.L_x_1)", "LDG.E R2, [R2.64]", "EXIT", ".L_x_1:", "NOP", "EXIT")
    assert through(forked, [2]) == {0, 1, 2, 3}
    assert through(forked, [1]) == set(range(6))
    assert through(LOOP, [2]) == {0, 1, 2, 3, 4, 5, 6}


def test_loops_in_loops():
    nested = listing(
        "NOP", ".L_x_1:", "NOP", ".L_x_2:", "NOP", "BRA.U UP0, `(.L_x_2)", "@P0 BRA `(.L_x_1)", "@P1 EXIT", "EXIT"
    )
    assert sorted(loops(nested), key=len) == [{2, 3}, {1, 2, 3, 4}]


def test_threads_that_part_are_left_out():
    assert reachable(listing("BRA.DIV UR4, `(.L_x_1)", "EXIT", ".L_x_1:", "NOP", "EXIT")) == [0, 1]
    together = listing("BRA.CONV ~URZ, `(.L_x_1)", "CALL.REL.NOINC `($__a_function)", ".L_x_1:", "EXIT", "RET.REL R2")
    assert reachable(together) == [0, 2]


@pytest.mark.parametrize(
    ("name", "kind", "width"),
    [
        ("LDG.E.128.CONSTANT", "load global", 16),
        ("LDG.E.64", "load global", 8),
        ("LDG.E", "load global", 4),
        ("LDG.E.U16", "load global", 2),
        ("LDGSTS.E.BYPASS.128", "load global", 16),
        ("LDS.128", "shared memory", None),
        ("LOP3.LUT", "logic", None),
        ("FFMA", "fma", None),
        ("FADD.FTZ", "add", None),
        ("HADD2", "add", None),
        ("HADD2.F32", "convert", None),
        ("IMAD.SHL.U32", "shift", None),
        ("IMAD.MOV.U32", "move", None),
        ("IMAD.WIDE.U32", "integer", None),
        ("F2FP.BF16.F32.PACK_AB", "convert", None),
        ("HMMA.16816.F32.BF16", "tensor core", None),
        ("HGMMA.64x16x16.F32.BF16", "tensor core", None),
        ("BAR.SYNC", "synchronize", None),
        ("EXIT", "control", None),
        ("VOTE.ANY", "other", None),
    ],
)
def test_kinds_and_widths(name, kind, width):
    (instruction,) = listing(f"{name} R0, [R2]").instructions
    assert (instruction.kind, instruction.load_bytes) == (kind, width)


def test_loads_are_traced_to_parameters():
    assert loaded_parameters(LOOP, 0x210) == {1: {1}}
    moved = listing(
        "ULDC.128 UR4, c[0x0][0x160]",
        "IMAD.WIDE R2, R9, 0x4, R6",
        "LEA R4, P0, R3, UR6, 0x2",
        "LDG.E R4, [R4.64]",
        "IMAD.WIDE.U32 R6, R4, R5, c[0x0][0x170]",
        "LDG.E.128 R8, [R6.64+0x20]",
        "LDGSTS.E.BYPASS.128 [R4], desc[UR8][R6.64+UR4]",
    )
    assert loaded_parameters(moved, 0x160) == {3: {1}, 5: {2}, 6: {0, 2}}


def test_what_a_register_held_before_is_not_traced():
    written = listing(
        "LDC.64 R2, c[0x0][0x210]",
        "LDC.64 R4, c[0x0][0x218]",
        "LDC.64 R6, c[0x0][0x220]",
        "CS2R R2, SRZ",
        "SHFL.BFLY PT, R4, R9, 0x1, 0x1f",
        "@!P0 LDG.E.U16 R3, desc[UR4][R6.64]",
        "IMAD.WIDE R8, R3, 0x2, R6",
        "IADD3 R8, P0, R8, R4, RZ",
        "ISETP.NE.AND P1, PT, R8, RZ, PT",
        "LDG.E R8, desc[UR4][R8.64]",
    )
    assert loaded_parameters(written, 0x210) == {5: {2}, 9: {2}}


def test_a_load_is_traced_on_every_way_to_it():
    chosen = listing(
        "LDC.64 R2, c[0x0][0x210]",
        "LDC.64 R4, c[0x0][0x218]",
        "@P0 BRA `(.L_x_2)",
        ".L_x_1:",
        "LDG.E R6, [R4.64]",
        "EXIT",
        ".L_x_2:",
        "@P1 BRA `(.L_x_3)",
        "IMAD.MOV.U32 R4, RZ, RZ, R2",
        ".L_x_3:",
        "@!P1 CALL.REL.NOINC `(.L_x_1)",
        "LDG.E R6, [R2.64]",
        "EXIT",
    )
    assert loaded_parameters(chosen, 0x210) == {3: {0, 1}, 8: {0}}


def test_pointers_kept_on_the_stack_are_traced():
    kept = listing(
        "LDC.64 R2, c[0x0][0x210]",
        "LDC.64 R4, c[0x0][0x218]",
        'STL.64 [R1+0x8], R2 (*"SpillRefill"*)',
        "STL [R1], R4",
        "STL [R1+0x4], RZ",
        "LDG.E.64 R2, [R4.64]",
        "LDL.LU.64 R2, [R1+0x8]",
        "LDG.E R6, [R2.64]",
        "LDL R2, [R1]",
        "LDG.E R6, [R2.64]",
        "LDL R2, [R1+0x4]",
        "LDG.E R6, [R2.64]",
    )
    assert loaded_parameters(kept, 0x210) == {5: {1}, 7: {0}, 9: {1}, 11: frozenset()}


def test_what_returns_is_an_error():
    with pytest.raises(ValueError, match="the target of RET is known only at run time"):
        listing("RET.REL.NODEC R2 `(.L_x_1)")


@pytest.mark.parametrize("spelling", ["3b-g16-s3", "3b-g16-s3-o2%", "4b-g128", "8b-g8-s8-o0.5%"])
def test_formats_are_spelled_as_they_are_read(spelling):
    assert str(Format.parse(spelling)) == spelling


@pytest.mark.parametrize("spelling", ["3", "3b-g16-o2", "b-g16", "3b-g16-s3-x"])
def test_a_spelling_that_is_none(spelling):
    with pytest.raises(ValueError, match=f"{spelling!r} is not a format"):
        Format.parse(spelling)


def test_tensor_of_a_format():
    w = Format.parse("3b-g16-s3-o2%").tensor((4096, 11008))
    assert (w.shape, w.bits, w.group_size) == ((4096, 11008), 3, 16)
    assert w.scale_codes.shape == (3, 256, 688)
    assert w.outliers.values.shape == (round(0.02 * 4096 * 11008),)
    with pytest.raises(ValueError, match="24 input features do not divide into groups of 16"):
        Format.parse("3b-g16").tensor((16, 24))


def test_what_is_missing_is_named(monkeypatch):
    def check(message: str, version: Callable, tool: Callable) -> None:
        monkeypatch.setattr(compiler, "_plugin_version", version)
        monkeypatch.setattr(compiler, "_tool", tool)
        with pytest.raises(ModuleNotFoundError, match=f"run `make aot-env` first: {message}"):
            compiler.check_installed()

    def missing(*_: str) -> None:
        raise FileNotFoundError("a package")

    check("a package is not installed", version=missing, tool=str)
    check("a package is not installed", version=lambda: jax.__version__, tool=missing)
    check("jax-cuda13-plugin is 0.1, but jax is", version=lambda: "0.1", tool=str)


SQUARE, WIDE = (4096, 4096), (4096, 11008)
DENSE = "3b-g16-s3", "4b-g16-s3"
SPARSE = "3b-g16-s3-o2%", "4b-g16-s3-o2%"
# One number of tokens per kernel.
TOKENS = [tokens for tokens in (1, 16, 512) if any(tokens in compiled.tokens for compiled in COMPILED)]
SETTINGS = [
    *itertools.product(["h100"], DENSE, TOKENS, [WIDE]),
    *itertools.product(["h100"], SPARSE, [1], [WIDE]),
    *itertools.product(["h100"], [DENSE[0], SPARSE[0]], [1], [SQUARE]),
    *itertools.product(sorted(GPUS.keys() - {"h100"}), DENSE[:1], TOKENS, [WIDE]),
    *itertools.product(["h100"], SPARSE[:1], [16, 512], [WIDE]),
    *itertools.product(["a100"], SPARSE[1:], [16], [WIDE]),
]


@pytest.fixture(scope="module")
def reports():
    """Reports of the kernels that read codes, by setting. All are compiled in one call."""
    parsed = [(target, Format.parse(form), tokens, shape) for target, form, tokens, shape in SETTINGS]
    found = report_all(parsed)
    return {
        setting: [kernel for kernel in kernels if kernel.instructions_per_weight is not None]
        for setting, kernels in zip(SETTINGS, found, strict=True)
    }


@needs_compiler
@pytest.mark.slow
def test_command():
    command = [sys.executable, "-m", "pallas_kernels.aot", "--target", "h100", "--format", "3b-g16-s3", "--json"]
    done = subprocess.run(
        [*command, "--tokens", "1", "--shape", "4096x4096"], capture_output=True, text=True, check=True
    )
    kernels = {kernel["kernel"]: kernel for kernel in json.loads(done.stdout)}
    kernel = kernels["spqr_fma"]
    assert (kernel["format"], kernel["tokens"], kernel["shape"], kernel["target"]) == (
        "3b-g16-s3",
        1,
        [4096, 4096],
        "h100",
    )
    assert (kernel["spill_bytes"], list(kernel["code_load_bytes"])) == (0, ["8"])
    assert 0 < kernel["registers"] <= 255
    assert sum(kernel["kinds"].values()) == pytest.approx(kernel["instructions_per_weight"])
    # Codes take 3 bits per weight, statistics (6 + 64 / 16) / 16 bits.
    assert kernel["bytes_per_weight"] == pytest.approx((3 + 10 / 16) / 8, rel=0.01)
    assert kernel["predicted_us"] == max(kernel["issue_us"], kernel["memory_us"])
    assert kernels["spqr_arrange"]["instructions_per_weight"] is None


@pytest.mark.parametrize(
    "arguments", [["--format", "3b"], ["--shape", "4096"], ["--tokens", "0"], ["--target", "v100"]]
)
def test_wrong_usage(arguments):
    assert CliRunner().invoke(app, ["--target", "h100", *arguments]).exit_code == 2


def test_what_does_not_fit_the_format_is_named():
    done = CliRunner().invoke(app, ["--target", "h100", "--format", "3b-g16", "--shape", "16x24"])
    assert (done.exit_code, done.stderr) == (1, "error: 24 input features do not divide into groups of 16\n")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_spills_and_wide_loads_of_codes(reports, setting):
    assert reports[setting]
    for kernel in reports[setting]:
        assert kernel.spill_bytes == 0
        # 8 bytes for one token: wider loads need more registers, so fewer programs run, which was slower on an H100.
        assert set(kernel.code_load_bytes) == {8 if setting[2] == 1 else 16}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_codes_are_loaded_once_and_programs_of_their_own_treat_outliers(reports, setting):
    (kernel,) = reports[setting]
    # Tiles of 64 or 32 words extend beyond the 344 words of 11008 columns.
    assert 1 <= kernel.code_reads <= 1.3
    # In the dequantize regime another kernel adds the outliers.
    assert (kernel.outlier_us > 0) == (setting[1] in SPARSE and setting[2] < 512)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "most", "shape"), [("3b-g16-s3", 4.0, SQUARE), ("3b-g16-s3", 4.0, WIDE), ("4b-g16-s3", 3.5, WIDE)]
)
def test_instructions_for_one_token(reports, form, most, shape):
    assert min(kernel.instructions_per_weight for kernel in reports["h100", form, 1, shape]) <= most


def packed_bytes(form: str, shape: tuple[int, int]) -> int:
    return Format.parse(form).tensor(shape).nbytes


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("form", DENSE)
def test_time_of_one_token_is_that_of_reading_the_matrix(reports, form):
    predicted = min(kernel.predicted_us for kernel in reports["h100", form, 1, WIDE])
    assert predicted <= 1.25 * 1e6 * packed_bytes(form, WIDE) / 3.0e12


@needs_compiler
@pytest.mark.slow
def test_two_percent_outliers_of_4_bit_weights_cost_15_percent(reports):
    dense, sparse = (reports["h100", form, 1, WIDE][0].predicted_us for form in ("4b-g16-s3", "4b-g16-s3-o2%"))
    assert sparse <= 1.15 * dense


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("shape", [SQUARE, WIDE])
def test_two_percent_outliers_of_3_bit_weights_cost_over_15_percent_because_they_are_that_large(reports, shape):
    forms = "3b-g16-s3", "3b-g16-s3-o2%"
    dense, sparse = (reports["h100", form, 1, shape][0] for form in forms)
    dense_bytes, sparse_bytes = (packed_bytes(form, shape) for form in forms)
    # At 4 bytes each, outliers add more than 15 % to the packed bytes, and they cost only the time to read them.
    assert sparse_bytes > 1.15 * dense_bytes
    assert sparse.predicted_us / dense.predicted_us == pytest.approx(sparse_bytes / dense_bytes, rel=0.01)
    # Their instructions fit into the time that reading takes.
    assert sparse.issue_us < sparse.memory_us


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(16 not in TOKENS, reason="no kernel treats 16 tokens")
@pytest.mark.parametrize("form", DENSE)
def test_tensor_cores_for_sixteen_tokens(reports, form):
    (kernel,) = reports["h100", form, 16, WIDE]
    assert kernel.kinds["tensor core"] > 0
    # Sets of two rows have 4.0, but take a tenth longer on an H100.
    assert kernel.instructions_per_weight <= 5.25
