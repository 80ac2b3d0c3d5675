"""Mixed bits: the wanted size is met, where bits matter most, and a search resumes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, MODEL, tiny_params

from spqr_jax import COMPACT, SpqrConfig, load
from spqr_jax.search import mixed_bits, size_search
from spqr_jax.search.allocation import Option
from spqr_jax.search.costs import estimate_costs
from spqr_jax.search.mixed_bits import (
    END_SETTINGS,
    bits_target,
    bytes_beside_matrices,
    file_target,
    mixed_rules,
    quantize_mixed,
    weights_of_blocks,
)
from spqr_jax.storage.checkpoint import describe
from spqr_jax.storage.directories import bytes_on_disk
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.totals import summarize, summarize_described

PARAMS = tiny_params(0)
SOURCE = ModelSource(MODEL, {name: lambda part=part: part for name, part in PARAMS.items()}, None)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 32)).astype(np.int32)
SMALL = SpqrConfig(group_size=16, stats_group_size=16, embedding_bits=8)
SETTINGS = tuple({"bits": bits, "outlier_threshold": threshold} for bits, threshold in ((4, 1.0), (3, 1.0), (5, 0.3)))


@pytest.fixture(autouse=True)
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_bits, "SETTINGS", SETTINGS)


@pytest.mark.slow
def test_sizes_and_errors_are_those_of_the_packed_matrices() -> None:
    settings = [dataclasses.replace(SMALL, refit=False, **setting) for setting in SETTINGS]
    ends = [{"bits": bits, "scale_bits": 8, "zero_bits": 8} for bits in (5, 3, 8)]
    costs = estimate_costs(SOURCE, TOKENS, settings, ends)
    assert list(costs)[-2:] == ["embed_tokens", "lm_head"]
    assert len(costs) == 2 * 7 + 2
    for options in costs.values():
        large, small, largest = options
        assert small.size < large.size < largest.size
        assert small.cost > large.cost > largest.cost > 0


@pytest.mark.slow
def test_a_matrix_of_zeros_costs_nothing() -> None:
    zeros = {**PARAMS["layers_0"], "q_proj": {"kernel": np.zeros_like(PARAMS["layers_0"]["q_proj"]["kernel"])}}
    parts = {name: lambda part=part: part for name, part in {**PARAMS, "layers_0": zeros}.items()}
    costs = estimate_costs(SOURCE._replace(parts=parts), TOKENS, [dataclasses.replace(SMALL, **SETTINGS[0])])
    assert [option.cost for option in costs["layers_0.q_proj"]] == [0.0]


@pytest.mark.slow
def test_a_size_in_bits_is_met_and_settings_differ(tmp_path: Path) -> None:
    blocks = quantize_mixed(SOURCE, tmp_path / "out", TOKENS, config=SMALL, target=bits_target(SOURCE, 6.2))
    _, params, _ = load(tmp_path / "out")
    assert abs(summarize(params).bits_per_weight - 6.2) <= 0.02
    bits = {params[f"layers_{depth}"][name]["kernel"].bits for depth in (0, 1) for name in MODEL.new_block().matrices()}
    assert len(bits) > 1
    assert len(blocks) == 2 + 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_size_on_the_disk_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside so small a model, what describes it weighs more than its weights, and depends on the order of writes.
    beside = 20_000
    ends = [one | {"group_size": 16, "stats_group_size": 16} for one in END_SETTINGS if one["bits"] in (3, 5)]
    monkeypatch.setattr(mixed_bits, "END_SETTINGS", (*ends, {"group_size": 64}))

    def measure(checkpoint: Path) -> int:
        assert bytes_on_disk(checkpoint) > summarize_described(describe(checkpoint)).nbytes
        return summarize_described(describe(checkpoint)).nbytes + beside

    monkeypatch.setattr(mixed_bits, "bytes_on_disk", measure)
    target = bytes_beside_matrices(SOURCE, SMALL) + beside + int(6.2 * weights_of_blocks(SOURCE) / 8)
    quantize_mixed(SOURCE, tmp_path / "out", TOKENS, config=SMALL, target=file_target(SOURCE, SMALL, target, ends=True))
    params = load(tmp_path / "out").params
    assert {params["embed_tokens"]["embedding"].bits, params["lm_head"]["kernel"].bits} <= {3, 5}
    assert target - 0.04 * weights_of_blocks(SOURCE) / 8 <= measure(tmp_path / "out") <= target


@pytest.mark.slow
def test_an_interrupted_search_keeps_its_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    options = {"config": SMALL, "target": bits_target(SOURCE, 6.2)}
    with monkeypatch.context() as patch:
        patch.setattr(size_search, "quantize_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_mixed(SOURCE, tmp_path / "out", TOKENS, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["out.budget.json"]
    monkeypatch.setattr(mixed_bits, "estimate_costs", interrupt)
    quantize_mixed(SOURCE, tmp_path / "out", TOKENS, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_size_that_no_settings_give_is_told() -> None:
    costs = {"a": [Option(200, 8.0), Option(300, 2.0)], "b": [Option(250, 3.0)]}
    message = r"the matrices take at least 450 bytes, but only 449 are left for them: give a larger"
    with pytest.raises(ValueError, match=message):
        mixed_rules(costs, {name: [{"bits": 3}, {"bits": 4}] for name in costs}, nbytes=449)


@pytest.mark.slow
def test_a_size_above_that_of_the_largest_settings_is_told_after_one_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give 7\.\d+ bits per weight, less than 11\.98: give a smaller"):
        quantize_mixed(SOURCE, tmp_path / "out", TOKENS, config=SMALL, target=bits_target(SOURCE, 12.0))


def test_what_cannot_be_used_is_named_before_the_work() -> None:
    bad = {**PARAMS, "layers_1": jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), PARAMS["layers_1"])}
    source = SOURCE._replace(parts={name: lambda part=part: part for name, part in bad.items()})
    with pytest.raises(ValueError, match=r"layers_1.*values that are NaN"):
        estimate_costs(source, TOKENS, [SMALL])
    with pytest.raises(ValueError, match="61"):
        estimate_costs(SOURCE, np.full((2, 16), 61), [SMALL])
    with pytest.raises(ValueError, match="do not divide into groups of 64"):
        estimate_costs(SOURCE, TOKENS, [COMPACT])


@pytest.mark.slow
def test_bytes_beside_matrices_are_those_of_a_checkpoint(tmp_path: Path) -> None:
    quantize_mixed(SOURCE, tmp_path / "out", TOKENS, config=SMALL, target=bits_target(SOURCE, 6.2))
    totals = summarize_described(describe(tmp_path / "out"))
    inside = totals.bits_per_weight * totals.weights / 8
    assert bytes_beside_matrices(SOURCE, SMALL) == pytest.approx(totals.nbytes - inside)
    ends = sum(
        load(tmp_path / "out").params[name][leaf].nbytes
        for name, leaf in (("embed_tokens", "embedding"), ("lm_head", "kernel"))
    )
    assert bytes_beside_matrices(SOURCE, SMALL, ends=True) == pytest.approx(totals.nbytes - inside - ends)
