"""What the decode benchmark finds, and the JSON files that hold it. Measured and predicted are never in one file."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model in one form, decoding so many sequences after prompts of one length.

    Attributes:
      weights: `bfloat16`, or the format as `Format` spells it.
      batch: number of sequences.
      prefix: tokens of each prompt; 0: from nothing, that is, from one token.
      weight_bytes: of all parameters.
      cache_bytes: of the keys and values of all slots.
      first_token_seconds: from prompts to first tokens; None where it is predicted, which it cannot be.
      step_seconds: from one token of each sequence to the next, the median; None where the row was skipped.
      step_quartiles: of what was measured.
      products_seconds: the part of a step that the products with matrices take, measured alone.
      attention_seconds: the same of the attention to the cache.
      rest_seconds: the step without both: norms, rotary embedding, sampling, all starts of kernels. Of measured parts
        it can be below zero.
      launches: kernels of a step, where it is predicted.
      tokens_per_second: of one sequence, after its first token.
      tokens_per_second_in_all: of all sequences.
      skipped: why there are no times.
    """

    weights: str
    batch: int
    prefix: int
    weight_bytes: int
    cache_bytes: int
    first_token_seconds: float | None = None
    step_seconds: float | None = None
    step_quartiles: tuple[float, float] | None = None
    products_seconds: float | None = None
    attention_seconds: float | None = None
    rest_seconds: float | None = None
    launches: int | None = None
    tokens_per_second: float | None = None
    tokens_per_second_in_all: float | None = None
    skipped: str | None = None

    def with_times(self, step: float, products: float, attention: float, **others: Any) -> "Row":
        """The row with the times of a step, and what follows from them."""
        return dataclasses.replace(
            self,
            step_seconds=step,
            products_seconds=products,
            attention_seconds=attention,
            rest_seconds=step - products - attention,
            tokens_per_second=1 / step,
            tokens_per_second_in_all=self.batch / step,
            **others,
        )


@dataclass(frozen=True)
class Results:
    """All rows of one model on one device.

    Attributes:
      measured: whether the times are measured; otherwise all are predicted.
      device: its name.
      model: its name, see `random_model`.
      new_tokens: tokens that each sequence is continued by.
      assumptions: what predicted times rest on.
      date: when it was found, in UTC.
      versions: of Python and JAX.
      rows: what was found.
    """

    measured: bool
    device: str
    model: str
    new_tokens: int
    assumptions: tuple[str, ...]
    date: str
    versions: dict[str, str]
    rows: tuple[Row, ...] = ()


def read(path: Path) -> Results:
    """What `pallas_kernels.benchmark.rows.write` has written.

    Example:
      >>> read(Path("notebooks/results/decode-h100-predicted.json")).measured
      False
    """
    found: dict[str, Any] = json.loads(path.read_text())
    rows = [
        Row(**{**row, "step_quartiles": row["step_quartiles"] and tuple(row["step_quartiles"])})
        for row in found.pop("rows")
    ]
    return Results(**{**found, "assumptions": tuple(found["assumptions"]), "rows": tuple(rows)})
