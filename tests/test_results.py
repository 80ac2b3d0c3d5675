"""The tables in notebooks/RESULTS.md and README.md are those of the committed JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spqr_jax import COMPACT, NEAR_LOSSLESS, SMALL, SpqrConfig
from spqr_jax.figures.sweep_figures import ablation_table, table

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "notebooks/RESULTS.md").read_text()
README = (ROOT / "README.md").read_text()


def committed(name: str) -> Any:
    return json.loads((ROOT / f"notebooks/results/{name}.json").read_text())


def row(text: str, first: str) -> list[str]:
    """The cells of the only table row whose first cell is `first`."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_sweep_and_ablation():
    results = committed("sweep-smollm2")
    assert table(results) in RESULTS
    assert ablation_table(results) in RESULTS
    assert table(committed("sweep-gemma3-270m")) in RESULTS


@pytest.mark.parametrize("text", [RESULTS, README], ids=["RESULTS.md", "README.md"])
@pytest.mark.parametrize(
    ("name", "config"),
    [("near-lossless", NEAR_LOSSLESS), ("compact", COMPACT), ("small", SMALL), ("paper", SpqrConfig())],
)
def test_presets(text, name, config):
    (cell,) = (
        result
        for result in committed("sweep-smollm2")
        if result["method"] == "spqr"
        and not result["whole_rows"]
        and all(getattr(config, key, value) == value for key, value in result.items())
    )
    assert f"{cell['bits_per_weight']:.2f}, **{cell['perplexity']:.2f}** (`{name}`)" in text


def test_kernels():
    rows = committed("kernels-h100")["rows"]
    for tokens in (1, 16, 2048):
        seconds = {one["contestant"]: one["seconds"] for one in rows if one["tokens"] == tokens}
        order = ("spqr_matmul", "dense part", "jnp.dot", "torch.matmul", "official kernel")
        cells = [f"{1e6 * seconds[name]:.1f}" if name in seconds else "" for name in order]
        cells += [
            f"{seconds[name] / seconds['spqr_matmul']:.2f}" if name in seconds else ""
            for name in ("jnp.dot", "official kernel")
        ]
        assert row(RESULTS, str(tokens)) == cells


def test_decoding():
    rows = committed("decode-h100")["rows"]
    for name, weights in (("packed, 3 bits", "3b-g16-s3-o1%"), ("bfloat16", "bfloat16")):
        empty, late = (one for one in rows if one["weights"] == weights)
        steps = [f"{1e3 * empty['step_seconds']:.2f} ms", f"{1e3 * late['step_seconds']:.2f} ms"]
        speeds = [f"{empty['tokens_per_second']:.0f}", f"{late['tokens_per_second']:.0f}"]
        assert row(RESULTS, name) == [f"{empty['weight_bytes'] / 1e9:.1f} GB", steps[0], speeds[0], steps[1], speeds[1]]


def test_sensitivity():
    matrices = committed("sensitivity-smollm2")["matrices"].values()
    for kind in {matrix["kind"] for matrix in matrices}:
        found = [matrix for matrix in matrices if matrix["kind"] == kind]
        means = []
        for measure in ("column_outliers", "row_outliers", "unstructured", "head_stripes", "rotary_period"):
            known = [matrix[measure] for matrix in found if matrix[measure] is not None]
            means.append(f"{np.mean(known):.2f}" if known else "")
        means.append(f"{np.mean([matrix['outlier_share'] for matrix in found]):.2%}")
        means.append(f"{np.mean([matrix['error_left'][3] for matrix in found]):.2f}")
        assert row(RESULTS, f"`{kind}`") == means
