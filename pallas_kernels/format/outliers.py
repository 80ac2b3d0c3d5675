"""The sparse part of a packed matrix: residuals of outliers in compressed sparse row (CSR) form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int, Int32, UInt16

STORED_NAMES = {"row_offsets": "offsets", "outlier_columns": "columns", "outlier_values": "values"}
"""Name of each array in a checkpoint, and its field here."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outliers:
    """Residuals w − ŵ of the outliers of a matrix, row by row. Only this type knows the layout of its arrays.

    Row r has the entries `offsets[r]` to `offsets[r + 1]`. Entries from `offsets[-1]` on are padding and zero.

    Methods that change the number of entries need concrete arrays. They use NumPy, because JAX would compile again for
    each number of outliers.

    Attributes:
      offsets: first entry of each row, then the number of outliers.
      columns: column of each entry in quantization order.
      values: residual of each entry.
    """

    offsets: Int32[Array | np.ndarray, "*stack offsets"]
    columns: UInt16[Array | np.ndarray, "*stack nnz"]
    values: Float16[Array | np.ndarray, "*stack nnz"]

    @classmethod
    def from_dense(
        cls, mask: Bool[Array | np.ndarray, "out in"], residuals: Float[Array | np.ndarray, "out in"]
    ) -> "Outliers":
        """The masked residuals, with room for every weight; can be traced.

        Example:
          >>> mask = jnp.array([[False, True], [False, False]])
          >>> Outliers.from_dense(mask, jnp.full((2, 2), 0.5)).trim()
          Outliers(offsets=Array([0, 1, 1], dtype=int32), columns=Array([1], dtype=uint16),
                   values=Array([0.5], dtype=float16))
        """
        out, columns = mask.shape
        flat = mask.reshape(-1)
        slots = jnp.where(flat, jnp.cumsum(flat) - 1, flat.size)
        column = jnp.tile(jnp.arange(columns, dtype=jnp.uint16), out)
        value = residuals.reshape(-1).astype(jnp.float16)
        return cls(
            offsets=jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(mask.sum(axis=1, dtype=jnp.int32))]),
            columns=jnp.zeros(flat.size, jnp.uint16).at[slots].set(column, mode="drop"),
            values=jnp.zeros(flat.size, jnp.float16).at[slots].set(value, mode="drop"),
        )

    def add_rows(self, weight: Float[Array, "rows in"], rows: Int[Array, " rows"]) -> Float[Array, "rows in"]:
        """Adds the residuals of some rows to these rows, columns in quantization order; can be traced.

        Takes as many steps as the row with the most outliers has.

        Example:
          >>> mask = jnp.array([[False, True], [False, False]])
          >>> Outliers.from_dense(mask, jnp.full((2, 2), 0.5)).add_rows(jnp.zeros((1, 2)), jnp.array([0]))
          Array([[0. , 0.5]], dtype=float32)
        """
        offsets, columns, values = map(jnp.asarray, (self.offsets, self.columns, self.values))
        first, counts = offsets[rows], offsets[rows + 1] - offsets[rows]

        def add(index: Int[Array, ""], weight: Float[Array, "rows in"]) -> Float[Array, "rows in"]:
            entry = first + jnp.minimum(index, counts - 1)
            residual = jnp.where(index < counts, values[entry].astype(weight.dtype), 0)
            return weight.at[jnp.arange(len(rows)), columns[entry]].add(residual)

        return jax.lax.fori_loop(0, counts.max(initial=0), add, weight) if self.capacity else weight

    def arrays(self) -> dict[str, Array | np.ndarray]:
        """The arrays by their names in a checkpoint."""
        return {stored: getattr(self, name) for stored, name in STORED_NAMES.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array | np.ndarray]) -> "Outliers | None":
        """Inverse of `arrays`; None where these are missing."""
        if not STORED_NAMES.keys() & arrays.keys():
            return None
        return cls(**{name: arrays[stored] for stored, name in STORED_NAMES.items()})

    @property
    def count(self) -> Int32[Array | np.ndarray, "*stack"]:
        """Number of outliers."""
        return self.offsets[..., -1]

    @property
    def capacity(self) -> int:
        """Number of entries, padding included."""
        return self.columns.shape[-1]

    def rows(self) -> Int[Array, " nnz"]:
        """Row of each entry; padding gets the last row. Can be traced."""
        starts = jnp.zeros(self.capacity + 1, jnp.int32).at[self.offsets[1:-1]].add(1)
        return jnp.cumsum(starts[:-1])

    def trim(self) -> "Outliers":
        """The outliers without padding; of a stack, without what is padding in all of its matrices."""
        count = int(np.max(np.asarray(self.count), initial=0))
        # Copy: a view would keep the padding in memory.
        entries = (jax.device_put(np.asarray(a)[..., :count].copy()) for a in (self.columns, self.values))
        return Outliers(self.offsets, *entries)

    def pad(self, capacity: int) -> "Outliers":
        """The outliers with room for `capacity` entries."""
        columns, values = map(np.asarray, (self.columns, self.values))
        widths = [(0, 0)] * (columns.ndim - 1) + [(0, capacity - self.capacity)]
        return Outliers(self.offsets, np.pad(columns, widths), np.pad(values, widths))

    def crop(self, capacity: int) -> "Outliers":
        """The first `capacity` entries, which must include all outliers; computed on the arrays' devices."""
        columns, values = _first((self.columns, self.values), capacity)
        return Outliers(self.offsets, columns, values)

    def slice_rows(self, start: int, stop: int) -> "Outliers":
        """The outliers of rows `start` to `stop`."""
        offsets = np.asarray(self.offsets)[start : stop + 1]
        return Outliers(offsets - offsets[0], *self._entries(slice(offsets[0], offsets[-1])))

    def split_columns(self, width: int, parts: int) -> list["Outliers"]:
        """The outliers of each `width` consecutive columns, with columns counted from the first of these."""
        offsets = np.asarray(self.offsets)
        row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        columns, values = self._entries(slice(len(row)))
        part, column = np.divmod(columns, width)
        return [
            Outliers(
                _offsets(np.bincount(row[part == index], minlength=len(offsets) - 1)),
                column[part == index].astype(np.uint16),
                values[part == index],
            )
            for index in range(parts)
        ]

    def _entries(self, which: slice) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.columns)[which], np.asarray(self.values)[which]


def join(parts: Sequence[tuple[Outliers | None, int]]) -> Outliers | None:
    """The outliers of matrices stacked vertically, without padding.

    Args:
      parts: outliers of each matrix, None where it has none, and its number of rows.

    Returns:
      The outliers of all rows; None where no matrix has any.
    """
    present = [outliers.trim() for outliers, _ in parts if outliers is not None]
    if not present:
        return None
    counts = [np.zeros(rows, int) if part is None else np.diff(np.asarray(part.offsets)) for part, rows in parts]
    return Outliers(
        offsets=jnp.asarray(_offsets(np.concatenate(counts))),
        columns=jnp.asarray(np.concatenate([outliers.columns for outliers in present])),
        values=jnp.asarray(np.concatenate([outliers.values for outliers in present])),
    )


def _offsets(counts: Int[np.ndarray, " out"]) -> Int32[np.ndarray, " out+1"]:
    return np.cumsum([0, *counts], dtype=np.int32)


@partial(jax.jit, static_argnames="capacity")
def _first(entries: tuple[Array, Array], capacity: int) -> tuple[Array, Array]:
    columns, values = entries
    return columns[..., :capacity], values[..., :capacity]
