"""The model card of a checkpoint or an export, `README.md`: what the model is, how large and how good, how to load it.

The card is for people and for the Hugging Face hub. No command reads it, and it is not in the manifest: its owner may
edit or delete it.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spqr_jax.models.decoder import Decoder
from spqr_jax.rules import described
from spqr_jax.storage.description import Entries, describe_model
from spqr_jax.storage.layout import CARD
from spqr_jax.storage.record import Record
from spqr_jax.storage.totals import is_end, summarize_described

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""Ids of the hub; names of other base models are in the text alone, because the hub checks those in the header."""

METHOD = (
    "SpQR keeps a few weights exact and stores the others in low-bit codes "
    "([arXiv 2306.03078](https://arxiv.org/abs/2306.03078))."
)


class Origin(NamedTuple):
    """Where the weights of a model come from.

    Attributes:
      base_model: name or hub id of the original; None if it is not known.
      record: of the quantization, where there is one.
    """

    base_model: str | None = None
    record: Record | None = None


UNKNOWN = Origin()
"""The origin of weights that nothing is known of."""


class Form(NamedTuple):
    """The form that a model is written in.

    Attributes:
      library: the hub's name of the library that loads it.
      stored: one sentence on the form of the weights.
      loading: lines of Python that load it.
      note: one sentence on what loading needs; empty if nothing.
    """

    library: str
    stored: str
    loading: str
    note: str = ""


CHECKPOINT = Form(
    "spqr-jax",
    "The quantized matrices are packed, in the format of spqr-jax.",
    """from spqr_jax import generate, load

model, params, tokenizer = load("path/to/this/directory")
print(tokenizer.decode(generate(model, params, [tokenizer.encode("The sky is")], max_new_tokens=20)[0]))""",
    'It needs spqr-jax: `pip install "spqr-jax[models]"`.',
)


def write_card(root: Path, model: Decoder, entries: Entries, form: Form, origin: Origin) -> None:
    """Writes the model card into the directory of a checkpoint or an export."""
    (root / CARD).write_text(model_card(model, entries, form, origin), encoding="utf-8")


def model_card(model: Decoder, entries: Entries, form: Form, origin: Origin = UNKNOWN) -> str:
    """The text of a model card: a header for the hub, and sections of Markdown.

    Args:
      model: the Flax module.
      entries: of all parameters, see `parts.entries_of`; packed matrices count as quantized.
      form: the form that the model is written in.
      origin: of the weights.

    Example:
      >>> from spqr_jax.storage.checkpoint import describe
      >>> print(model_card(model, describe("tiny-spqr"), CHECKPOINT, Origin("tiny")))
      ---
      library_name: spqr-jax
      tags:
      - spqr
      ---
      # tiny, quantized with SpQR
      ...
    """
    quantized = bool(entries["matrices"])
    base = origin.base_model
    title = _cell(base) if base else f"A {describe_model(model)['family']} model"
    sections = [
        _header(form, base, quantized),
        f"# {title}{', quantized with SpQR' if quantized else ''}",
        f"{METHOD} {form.stored}" if quantized else "The weights are not quantized.",
        _table(_sizes(model, entries, base)),
    ]
    if origin.record is not None:
        sections += ["## Settings", _table(_settings(origin.record)), "## Measured quality"]
        sections += [_table(_quality(origin.record))]
    sections += ["## Loading", form.note, f"```python\n{form.loading}\n```"]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(form: Form, base: str | None, quantized: bool) -> str:
    lines = ["---", f"library_name: {form.library}"]
    if base and HUB_ID.fullmatch(base):
        lines += [f"base_model: {base}", *(["base_model_relation: quantized"] if quantized else [])]
    return "\n".join([*lines, *(["tags:", "- spqr"] if quantized else []), "---"])


def _sizes(model: Decoder, entries: Entries, base: str | None) -> dict[str, str]:
    described, config = describe_model(model), model.config
    totals = summarize_described(entries)
    packed, dense = entries["matrices"], entries["dense"].values()
    matrices = [entry for name, entry in packed.items() if not is_end(name)]
    ends = {name: entry for name, entry in packed.items() if is_end(name)}
    found = {
        "base model": base or "not known",
        "architecture": f"{described.get('alias', described['family'])}, {config.num_layers} blocks, hidden size "
        f"{config.hidden_size}, {config.vocab_size} tokens in the vocabulary",
        "parameters": f"{totals.parameters:,}",
        "size": f"{totals.bits_per_parameter:.3f} bits per parameter: {totals.nbytes:,} bytes",
    }
    if matrices:
        codes = sorted({f"{matrix['bits']} bits in groups of {matrix['group_size']}" for matrix in matrices})
        found |= {
            "quantized": f"{totals.weights:,} weights in {len(matrices)} matrices, with {', '.join(codes)}",
            "size of these": f"{totals.bits_per_weight:.3f} bits per weight, all packed arrays included: "
            f"{sum(matrix['bytes'] for matrix in matrices):,} bytes",
            "outliers": f"{totals.outlier_share:.2%}",
        }
    for name, entry in ends.items():
        width = f"{entry['bits']} bits in groups of {entry['group_size']}"
        found[name.partition(".")[0]] = f"{width}: {entry['bytes']:,} bytes"
    types = ", ".join(sorted({array["dtype"] for array in dense}))
    found["other arrays"] = f"{sum(array['bytes'] for array in dense):,} bytes ({types})"
    return found


def _settings(record: Record) -> dict[str, str]:
    shape = record.calibration
    calibration = "none" if shape is None else f"{shape[0]:,} sequences of {shape[1]:,} tokens"
    settings = {name.replace("_", " "): _plain(value) for name, value in dataclasses.asdict(record.config).items()}
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return {
        **settings,
        **described(record.rules),
        "calibration": calibration,
        "date": record.date,
        "versions": versions,
    }


def _quality(record: Record) -> dict[str, str]:
    errors = [matrix.relative_error for block in record.blocks for matrix in block.matrices.values()]
    measured = {name: f"{value:,.4g}" for name, value in (record.quality or {}).items()}
    if errors:
        inputs = "weights" if record.calibration is None else "outputs on the calibration text"
        measured[f"mean relative squared error of the matrices' {inputs}"] = f"{np.mean(errors):.3g}"
    return measured


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {_cell(text)} |" for name, text in rows.items())])


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _cell(text: str) -> str:
    """Text in a cell of a table: on one line, and without an end of the cell."""
    return " ".join(text.replace("|", "\\|").split())
