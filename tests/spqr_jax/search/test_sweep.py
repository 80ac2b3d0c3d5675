"""Grids of settings: which cells they have, that each is measured as it would be alone, and once."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, tiny_params
from hypothesis import given
from hypothesis import strategies as st

from spqr_jax import perplexity, quantize, summarize
from spqr_jax.config import Method, SpqrConfig
from spqr_jax.figures.sweep_figures import ablation_table, label, perplexity_figure, table
from spqr_jax.models import Llama
from spqr_jax.search import near_lossless, sweep
from spqr_jax.search.near_lossless import smallest_near_lossless
from spqr_jax.search.sweep import DEFAULT_GRID, Cell, ablations, cells, front
from spqr_jax.storage import checkpoint
from spqr_jax.storage.model_source import ModelSource

# Each cell compiles the solver anew: one block is compiled in half the time of two.
MODEL = Llama(dataclasses.replace(CONFIG, num_layers=1))
PARAMS = tiny_params(0, MODEL)
SOURCE = ModelSource(MODEL, {name: lambda part=part: part for name, part in PARAMS.items()}, None)
MAPPINGS = Path("/proc/self/maps")
RNG = np.random.default_rng(0)
CALIBRATION = RNG.integers(0, CONFIG.vocab_size, (4, 24)).astype(np.int32)
WINDOWS = RNG.integers(0, CONFIG.vocab_size, (3, 32)).astype(np.int32)
GRID = cells(
    [
        {"method": "spqr", "outlier_threshold": 0.1},
        {"method": "spqr", "outlier_threshold": 0.1, "whole_rows": True},
        {"method": ["gptq", "rtn"]},
    ]
)

RESULTS = st.lists(
    st.fixed_dictionaries({"bits_per_weight": st.floats(2, 8), "perplexity": st.floats(1, 100)}), min_size=1
)


def test_a_list_stands_for_each_of_its_values() -> None:
    found = cells([{"method": "spqr", "bits": [3, 4], "stats_bits": [3, None]}])
    settings = [(cell.config.bits, cell.config.scale_bits, cell.config.zero_bits) for cell in found]
    assert settings == [(3, 3, 3), (3, None, None), (4, 3, 3), (4, None, None)]
    assert all(cell.config.outlier_threshold == SpqrConfig().outlier_threshold for cell in found)


def test_equal_cells_are_one_and_whole_rows_come_last() -> None:
    found = cells([{"method": "spqr", "whole_rows": True}, {"method": "spqr", "bits": [3, 3]}])
    assert [cell.whole_rows for cell in found] == [False, True]


def test_names_tell_cells_of_the_grid_apart() -> None:
    found = cells(DEFAULT_GRID)
    assert len({cell.name for cell in found}) == len(found) >= 16
    assert {cell.method for cell in found} == set(Method)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "spqr", "bit": 3}, "unknown setting: bit"),
        ({"bits": 3}, "has no method"),
        ({"method": "spqr", "fit": ["error", "errors"]}, "has fit 'errors': give min_max or error"),
        ({"method": "awq"}, "has method 'awq': give spqr or gptq or rtn"),
        ({"method": "spqr", "whole_rows": True}, "add that cell to the grid"),
    ],
)
def test_a_wrong_grid_is_told(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cells([entry])


@given(RESULTS)
def test_nothing_is_as_small_and_better_than_the_front(results: list[dict[str, Any]]) -> None:
    best = front(results)
    sizes, perplexities = ([result[key] for result in best] for key in ("bits_per_weight", "perplexity"))
    assert sizes == sorted(set(sizes))
    assert perplexities == sorted(set(perplexities), reverse=True)
    for result in results:
        assert any(
            b["bits_per_weight"] <= result["bits_per_weight"] and b["perplexity"] <= result["perplexity"] for b in best
        )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("sweep") / "results"
    return directory, list(sweep.sweep(SOURCE, directory, GRID, CALIBRATION, WINDOWS))


@pytest.mark.slow
def test_cells_are_what_quantize_gives(swept: tuple[Path, list[dict[str, Any]]]) -> None:
    original, *results = swept[1]
    text = WINDOWS.reshape(-1)
    assert original["perplexity"] == perplexity(MODEL, PARAMS, text, window=32)
    for cell, result in zip(GRID, results, strict=True):
        if cell.whole_rows:
            continue
        tokens = None if cell.method is Method.RTN else CALIBRATION
        quantized, _ = quantize(PARAMS, tokens, model=MODEL, config=cell.config)
        assert result["bits_per_weight"] == summarize(quantized).bits_per_weight
        assert result["outlier_share"] == summarize(quantized).outlier_share
        assert result["perplexity"] == pytest.approx(perplexity(MODEL, quantized, text, window=32), rel=1e-5)


@pytest.mark.skipif(not MAPPINGS.exists(), reason="only Linux counts the memory mappings of a process")
@pytest.mark.slow
def test_cells_leave_no_programs_in_memory(tmp_path: Path) -> None:
    grid = cells([{"method": "rtn", "bits": [2, 3, 4, 5]}])
    counts = [
        len(MAPPINGS.read_text().splitlines())
        for _ in sweep.sweep(SOURCE, tmp_path / "results", grid, CALIBRATION, WINDOWS)
    ]
    # The programs of one cell take hundreds.
    assert counts[-1] < counts[1] + 100


@pytest.mark.slow
def test_whole_rows_have_the_share_of_single_weights(swept: tuple[Path, list[dict[str, Any]]]) -> None:
    by_name = {result["name"]: result for result in swept[1]}
    rows = by_name[GRID[-1].name]
    single = by_name[dataclasses.replace(GRID[-1], whole_rows=False).name]
    # Matrices have 16 to 48 rows: the share is rounded to one of them.
    assert single["outlier_share"] > 0.02
    assert abs(rows["outlier_share"] - single["outlier_share"]) < 1 / 32
    assert rows["outlier_threshold"] == single["outlier_threshold"] == 0.1


@pytest.mark.slow
def test_every_result_is_a_file_and_no_checkpoint_stays(swept: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, results = swept
    assert {path.name for path in directory.iterdir()} == {
        "run.json",
        *(f"{result['name']}.json" for result in results),
    }
    for result in results:
        assert json.loads((directory / f"{result['name']}.json").read_text()) == result
    assert {"device", "machine", "versions", "date", "seconds"} <= results[1].keys()


@pytest.mark.slow
def test_nothing_finished_is_done_again(
    swept: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, results = swept
    monkeypatch.setattr(sweep, "quantize_checkpoint", None)
    monkeypatch.setattr(sweep, "token_losses", None)
    assert list(sweep.sweep(SOURCE, directory, GRID, CALIBRATION, WINDOWS)) == results


@pytest.mark.slow
def test_results_of_another_text_are_refused(swept: tuple[Path, list[dict[str, Any]]]) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"text\.tokens"):
        next(sweep.sweep(SOURCE, swept[0], GRID, CALIBRATION, WINDOWS + 1 - 1 * (WINDOWS > 50)))


@pytest.mark.slow
def test_a_cell_that_was_stopped_while_it_was_measured_is_not_quantized_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = sweep.sweep(SOURCE, tmp_path / "results", GRID[:1], CALIBRATION, WINDOWS)
    next(steps)
    with monkeypatch.context() as stopped:
        stopped.setattr(sweep, "token_losses", lambda *_: iter([KeyboardInterrupt()]))
        with pytest.raises(Exception):  # noqa: B017, PT011
            next(steps)
    assert (tmp_path / "results" / GRID[0].name).is_dir()
    monkeypatch.setattr(sweep, "quantize_checkpoint", None)
    _, result = sweep.sweep(SOURCE, tmp_path / "results", GRID[:1], CALIBRATION, WINDOWS)
    assert result["seconds"] > 0
    assert not (tmp_path / "results" / GRID[0].name).exists()


def test_a_cell_that_does_not_fit_the_model_is_told_before_long_work(tmp_path: Path) -> None:
    grid = cells([{"method": "rtn", "group_size": [16, 128]}])
    with pytest.raises(ValueError, match="do not divide into groups of 128"):
        next(sweep.sweep(SOURCE, tmp_path / "results", grid, CALIBRATION, WINDOWS))
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_tables_and_figure(swept: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    _, results = swept
    lines = table(results).splitlines()
    assert len(lines) == 2 + len(GRID)
    best = {label(result) for result in front(results[1:])}
    assert {line.split("|")[1].strip(" *") for line in lines[2:] if "**" in line} == best
    perplexity_figure(results, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_an_ablation_changes_one_part() -> None:
    grid = cells([{"method": "spqr", "bits": [3, 4], "stats_bits": [3, None]}, {"method": "spqr", "simplified": True}])
    results = [
        {**cell.settings, "bits_per_weight": 4.0, "outlier_share": 0.01, "perplexity": number}
        for number, cell in enumerate(grid)
    ]
    found = ablations(results)
    assert set(found) == {"", "bits 4", "stats_bits None", "simplified True"}
    assert found[""]["perplexity"] == 0
    assert ablation_table(results).splitlines()[2].startswith("| nothing | 4.00 | 1.00% | 0.00 |")


# What the README says of SmolLM2

RESULTS_FILE = Path(__file__).parents[3] / "notebooks" / "results" / "sweep-smollm2.json"


@pytest.fixture(scope="module")
def smollm2() -> list[dict[str, Any]]:
    return json.loads(RESULTS_FILE.read_text())


def test_spqr_is_the_front_from_3_3_to_4_8_bits(smollm2: list[dict[str, Any]]) -> None:
    """No other method's point lies under the line through SpQR's points."""
    spqr = front(result for result in smollm2 if result["method"] == "spqr")
    sizes, perplexities = ([result[key] for result in spqr] for key in ("bits_per_weight", "perplexity"))
    assert round(sizes[0], 1) <= 3.3
    assert sizes[-1] > 4.6
    others = [r for r in smollm2 if r["method"] in ("gptq", "rtn") and 3.3 <= r["bits_per_weight"] <= 4.8]
    assert len(others) >= 4
    for result in others:
        assert result["perplexity"] > np.interp(result["bits_per_weight"], sizes, perplexities), label(result)


LADDER = [SpqrConfig(bits=bits) for bits in (2, 8)]


@pytest.mark.slow
def test_search_ends_at_what_is_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_lossless, "LARGEST_RISE", 1e9)
    found = smallest_near_lossless(SOURCE, tmp_path / "search", CALIBRATION, WINDOWS, settings=LADDER)
    assert found.config == LADDER[0]
    assert found.original_perplexity == perplexity(MODEL, PARAMS, WINDOWS.reshape(-1), window=32)
    assert len(found.tried) <= 2


@given(st.lists(st.floats(-0.01, 0.1), max_size=12))
def test_search_agrees_with_trying_all(rises: list[float]) -> None:
    rises.sort(reverse=True)
    settings = [SpqrConfig(damping=float(place)) for place in range(len(rises))]

    def fake(_source: Any, _directory: Any, grid: list[Cell], *_: Any, mesh: None) -> Any:
        rise = rises[int(grid[0].config.damping)]
        return iter([{"perplexity": 10.0}, {"perplexity": 10 * (1 + rise)}])

    with mock.patch.object(near_lossless, "sweep", fake):
        found = smallest_near_lossless(SOURCE, Path("unused"), CALIBRATION, WINDOWS, settings=settings)
    within = [10 * (1 + rise) < 1.01 * 10 for rise in rises]
    assert found.config == (settings[within.index(True)] if any(within) else None)
    assert len(found.tried) <= len(rises).bit_length()


def test_default_config_is_the_base() -> None:
    assert Cell(Method.SPQR, SpqrConfig()).name == "spqr_3bit"
