"""The results of the decode benchmark and their JSON files. A file has either measured or predicted times."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One model in one format that decodes a batch of sequences after prompts of one length.

    Attributes:
      weights: `bfloat16`, or the format as `Format` spells it.
      batch: number of sequences.
      prefix: tokens of each prompt. 0 stands for a prompt of one token.
      weight_bytes: bytes of all parameters.
      cache_bytes: bytes of the keys and values in all slots.
      first_token_seconds: time from the prompts to the first tokens. None for predicted rows.
      step_seconds: median time of a step, in which each sequence gets one token. None for skipped rows.
      step_quartiles: lower and upper quartile of measured steps.
      products_seconds: time of the step's products with matrices, measured alone.
      attention_seconds: time of the step's attention over the cache, measured alone.
      rest_seconds: step without products and attention: norms, rotary embedding, sampling and kernel launches. It can
        be negative, because the parts are measured alone.
      launches: kernel launches per step. None for measured rows.
      tokens_per_second: rate of one sequence after its first token.
      tokens_per_second_in_all: rate of all sequences together.
      skipped: reason for missing times.
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
        """The row with the times of a step and the values derived from them.

        Example:
          >>> Row("bfloat16", 2, 0, 10, 10).with_times(0.5, 0.25, 0.125).tokens_per_second_in_all
          4.0
        """
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
      measured: True if the times are measured, False if they are predicted.
      device: name of the device.
      model: name of the model, see `random_model`.
      new_tokens: tokens generated per sequence.
      assumptions: assumptions of predicted times.
      date: date and time in UTC.
      versions: versions of Python and JAX.
      rows: the rows.
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
    """Reads results that `pallas_kernels.benchmark.rows.write` wrote.

    Example:
      >>> results = Results(True, "a GPU", "tiny", 100, (), "2026-01-01T00:00:00+00:00", {})
      >>> _ = Path("decode.json").write_text(json.dumps(dataclasses.asdict(results)))
      >>> read(Path("decode.json")) == results
      True
    """
    found: dict[str, Any] = json.loads(path.read_text())
    rows = [
        Row(**{**row, "step_quartiles": row["step_quartiles"] and tuple(row["step_quartiles"])})
        for row in found.pop("rows")
    ]
    return Results(**{**found, "assumptions": tuple(found["assumptions"]), "rows": tuple(rows)})
