"""A grid of methods and settings over one model: the size and the perplexity of each.

Source: the tables of Dettmers et al. 2023 (arXiv 2306.03078): round-to-nearest, GPTQ and SpQR at several sizes, and the
ablation of SpQR's parts.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from pallas_kernels.errors import SpqrError
from spqr_jax.config import SETTINGS, Method, Rules, SpqrConfig, allowed_values, changed, is_of_type
from spqr_jax.measure.perplexity import counted_perplexity, token_losses
from spqr_jax.models.decoder import Decoder, Params, layer_name
from spqr_jax.models.precision import for_computing
from spqr_jax.quantization.checks import check_weights
from spqr_jax.rules import Plan
from spqr_jax.storage.checkpoint import is_checkpoint, load
from spqr_jax.storage.description import describe_model
from spqr_jax.storage.digests import digest
from spqr_jax.storage.directories import remove_directory, write_text
from spqr_jax.storage.disk_to_disk import quantize_checkpoint
from spqr_jax.storage.json_files import read_json
from spqr_jax.storage.model_source import ModelSource
from spqr_jax.storage.partial_run import PartialRun
from spqr_jax.storage.paths import resolved
from spqr_jax.storage.record import Record, new_record, read_record
from spqr_jax.storage.totals import summarize

DEFAULT_GRID: tuple[Mapping[str, Any], ...] = (
    {"method": "rtn", "stats_bits": 3},
    {"method": "rtn", "bits": 4, "group_size": 64, "stats_bits": None},
    {"method": "gptq", "group_size": [16, 32, 64]},
    {"method": "gptq", "bits": 4, "group_size": [32, 64]},
    {"method": "spqr", "group_size": 64, "outlier_threshold": [0.4, 1.2], "fit": "error"},
    {"method": "spqr", "group_size": 32, "outlier_threshold": [0.3, 0.6], "fit": "error"},
    {"method": "spqr", "bits": 4, "group_size": 64, "outlier_threshold": [0.3, 1.2], "fit": "error"},
    {"method": "spqr", "bits": 4, "group_size": 64, "outlier_threshold": 1.2},
    {"method": "spqr", "bits": 4, "group_size": 32, "outlier_threshold": 0.1, "fit": ["min_max", "error"]},
    {"method": "spqr", "bits": 4, "group_size": 32, "outlier_threshold": 0.6, "fit": "error", "stats_group_size": 64},
    {"method": "spqr", "bits": 4, "outlier_threshold": 0.1, "fit": "error", "stats_group_size": 64},
    # The presets: small, compact and near-lossless.
    {"method": "spqr", "outlier_threshold": 0.8, "fit": "error", "stats_group_size": 64},
    {"method": "spqr", "bits": 4, "group_size": 64, "outlier_threshold": 1.2, "fit": "error", "stats_group_size": 32},
    {"method": "spqr", "bits": 4, "group_size": 32, "outlier_threshold": 0.1, "fit": "error", "stats_group_size": 32},
    # The ablation: the paper's setting with one part changed.
    {"method": "spqr"},
    {"method": "spqr", "stats_bits": None},
    {"method": "spqr", "permutation": "identity"},
    {"method": "spqr", "simplified": True},
    {"method": "spqr", "whole_rows": True},
    {"method": "spqr", "fit": "error"},
    {"method": "spqr", "damping": 1.0},
    {"method": "spqr", "shrinkage": 0.0},
    {"method": "spqr", "refit": False},
    {"method": "spqr", "sequential": False},
)
"""Settings by name; a list expands to one cell per value, see `cells`. Sizes are from 3.2 to 5 bits."""


@dataclass(frozen=True)
class Cell:
    """One setting of a grid.

    Attributes:
      method: SpQR, GPTQ or round-to-nearest.
      config: its settings.
      whole_rows: keeps whole rows in 16 bits, as large a share as the same cell keeps of single weights.
    """

    method: Method
    config: SpqrConfig
    whole_rows: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify a cell, in JSON types."""
        return {"method": self.method.value, **dataclasses.asdict(self.config), "whole_rows": self.whole_rows}

    @property
    def name(self) -> str:
        """The method, the bits, and the settings that are not the default; used as a file name."""
        changed = [
            f"{setting.replace('_', '-')}-{value}"
            for setting, value in self.settings.items()
            if setting not in ("method", "bits") and value != _DEFAULTS[setting]
        ]
        return "_".join([self.method.value, f"{self.config.bits}bit", *changed])


_DEFAULTS = Cell(Method.SPQR, SpqrConfig()).settings
_TYPES = SETTINGS | {"method": Method, "whole_rows": bool}


def cells(grid: Iterable[object]) -> list[Cell]:
    """The distinct cells of a grid in order, those that keep whole rows last.

    Args:
      grid: entries with `method` and any fields of `SpqrConfig`, `stats_bits` for both kinds of statistics, and
        `whole_rows`; a list expands to one cell per value.

    Raises:
      SpqrError: an entry has an unknown setting or a value of another type, or a cell with whole rows has no cell with
        single weights to take its share from.

    Example:
      >>> [cell.name for cell in cells([{"method": "gptq", "bits": [3, 4]}])]
      ['gptq_3bit_outlier-threshold-None', 'gptq_4bit_outlier-threshold-None']
    """
    found = list(dict.fromkeys(itertools.chain.from_iterable(map(_expand, grid))))
    for cell in found:
        if cell.whole_rows and replace(cell, whole_rows=False) not in found:
            raise SpqrError(
                f"{cell.name} takes its share from {replace(cell, whole_rows=False).name}: add that cell to the grid"
            )
    return sorted(found, key=lambda cell: cell.whole_rows)


def _expand(entry: object) -> Iterator[Cell]:
    if not isinstance(entry, Mapping):
        raise SpqrError(f"the grid's entry {entry!r} is no object of settings")
    names = [name for field in entry for name in (("scale_bits", "zero_bits") if field == "stats_bits" else (field,))]
    if unknown := set(names) - {*_DEFAULTS} or {"method"} - set(names):
        raise SpqrError(f"the grid's entry {dict(entry)} has no method or an unknown setting: {', '.join(unknown)}")
    lists = [value if isinstance(value, list) else [value] for value in entry.values()]
    for values in itertools.product(*lists):
        chosen = dict(zip(entry, values, strict=True))
        for name, value in chosen.items():
            if not is_of_type(value, _TYPES[name]):
                raise SpqrError(
                    f"the grid's entry {dict(entry)} has {name} {value!r}: give {allowed_values(_TYPES[name])}"
                )
        method = Method(chosen.pop("method"))
        whole_rows = chosen.pop("whole_rows", False)
        try:
            config = changed(SpqrConfig(), chosen)
        except SpqrError as error:
            raise SpqrError(f"the grid's entry {dict(entry)}: {error}") from None
        yield Cell(method, method.config(config), whole_rows)


def sweep(
    source: ModelSource,
    directory: Path,
    grid: Sequence[Cell],
    calibration_tokens: Int[np.ndarray, "sequences tokens"],
    windows: Int[np.ndarray, "windows window"],
    *,
    rules: Rules = (),
    mesh: Mesh | None = None,
) -> Iterator[dict[str, Any]]:
    """Quantizes and measures a model in every cell of a grid, after the model itself.

    A finished cell is a JSON file in the directory, and is not measured again. An interrupted cell resumes with its
    first unfinished block. All cells share the calibration tokens and the windows. Their calibration passes differ from
    the first block on, because each follows its own quantized blocks; round-to-nearest has none.

    Args:
      source: the model.
      directory: the directory of results.
      grid: see `cells`.
      calibration_tokens: token ids of sequences of equal length.
      windows: token ids on which perplexity is measured, see `cut_windows`.
      rules: changes of the settings of every cell for some matrices, see `quantize`.
      mesh: devices that share the work of quantizing.

    Returns:
      An iterator over the results as they are measured: settings, `bits_per_weight`, `outlier_share`, `perplexity`,
        `seconds` to quantize, and the machine, versions and date.

    Raises:
      CheckpointError: the directory holds the results of another model, calibration or text, and the message names the
        first difference; or as for `quantize_checkpoint`.
      SpqrError: as for `quantize_checkpoint` and `token_losses`.

    Example:
      >>> results = sweep(source, Path("results"), cells([{"method": "rtn"}]), calibration, calibration)
      >>> next(results)["name"]
      'original'
    """
    description = {
        "model": describe_model(source.model),
        "calibration": {"shape": list(calibration_tokens.shape), "tokens": digest(calibration_tokens)},
        "text": {"shape": list(windows.shape), "tokens": digest(windows)},
        **({"rules": [list(rule) for rule in rules]} if rules else {}),
    }
    _check_cells(source, grid, rules)
    # Now, because the steps may be taken in another working directory.
    directory = resolved(directory)

    def measure(cell: Cell | None, shares: Mapping[str, float]) -> dict[str, Any]:
        name = "original" if cell is None else cell.name
        return _result(source, directory / name, cell, shares, calibration_tokens, windows, rules, mesh)

    return _steps(directory, description, grid, measure)


def _steps(
    directory: Path,
    description: Mapping[str, Any],
    grid: Sequence[Cell],
    measure: Callable[[Cell | None, Mapping[str, float]], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yields the result of the model itself and of every cell, each measured unless its file is there."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with PartialRun(directory).claim(description):
        shares: dict[str, float] = {}
        for cell in (None, *grid):
            name = "original" if cell is None else cell.name
            path = directory / f"{name}.json"
            if path.is_file():
                result = read_json(path)
            else:
                result = measure(cell, shares)
                write_text(path, json.dumps(result, indent=1) + "\n")
                if cell is not None:
                    _release(directory / name)
            shares[name] = result.get("outlier_share", 0.0)
            yield result


def _check_cells(source: ModelSource, grid: Sequence[Cell], rules: Rules) -> None:
    """Checks all settings against the first block, before the long work."""
    first = {layer_name(0): source.parts[layer_name(0)]()}
    for cell in grid:
        plan = Plan.of(cell.config, rules).checked(source.model)
        check_weights(first, source.model, plan)


def _original(source: ModelSource, windows: Int[np.ndarray, "windows window"], mesh: Mesh | None) -> dict[str, Any]:
    """The result of the model itself."""
    perplexity = _perplexity(source.model, source.read(), windows)
    result = {"name": "original", "method": "original", "bits_per_weight": 16.0, "perplexity": perplexity}
    return result | _circumstances(new_record(Plan(SpqrConfig()), None, [], mesh))


def _release(checkpoint: Path) -> None:
    """Deletes the checkpoint and the programs of a measured cell."""
    remove_directory(checkpoint)
    # Programs are compiled for a cell's settings and numbers of outliers. Those of some thirty cells take all 65,530
    # memory mappings that Linux allows a process.
    jax.clear_caches()


def _result(
    source: ModelSource,
    checkpoint: Path,
    cell: Cell | None,
    shares: Mapping[str, float],
    calibration_tokens: Int[np.ndarray, "sequences tokens"],
    windows: Int[np.ndarray, "windows window"],
    rules: Rules,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """The result of one cell, or (None) of the model itself; a checkpoint is kept until its result is written."""
    if cell is None:
        return _original(source, windows, mesh)
    config = cell.config
    if cell.whole_rows:
        config = replace(config, outlier_threshold=None, outlier_rows=shares[replace(cell, whole_rows=False).name])
    if not is_checkpoint(checkpoint):
        tokens = None if cell.method is Method.RTN else calibration_tokens
        quantize_checkpoint(source, checkpoint, tokens, config=config, rules=rules, mesh=mesh)
    model, params, _ = load(checkpoint)
    totals = summarize(params)
    record: Any = read_record(checkpoint)
    return {
        "name": checkpoint.name,
        **cell.settings,
        # Also where rules leave every matrix dense: tables and figures have these columns.
        "bits_per_weight": totals.bits_per_weight,
        "outlier_share": totals.outlier_share,
        **totals.sizes(),
        "perplexity": _perplexity(model, params, windows),
        "seconds": sum(block.seconds for block in record.blocks),
        **_circumstances(record),
    }


def _circumstances(record: Record) -> dict[str, Any]:
    """The machine, versions and date."""
    return {name: getattr(record, name) for name in ("device", "devices", "machine", "versions", "date")}


def _perplexity(model: Decoder, params: Params, windows: Int[np.ndarray, "windows window"]) -> float:
    return counted_perplexity(
        token_losses(for_computing(model), params, windows), [windows.shape[1] - 1] * len(windows)
    )


def front(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The Pareto front by size: no result of the same or a smaller size has a lower perplexity.

    Example:
      >>> results = [{"bits_per_weight": bits, "perplexity": p} for bits, p in ((3, 30), (4, 25), (4.5, 26))]
      >>> [result["bits_per_weight"] for result in front(results)]
      [3, 4]
    """
    best: list[Mapping[str, Any]] = []
    for result in sorted(results, key=lambda r: (r["bits_per_weight"], r["perplexity"])):
        if not best or result["perplexity"] < best[-1]["perplexity"]:
            best.append(result)
    return best


def ablations(results: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The SpQR results with at most one setting changed from the default, by that setting; the default itself is ""."""
    found: dict[str, Mapping[str, Any]] = {}
    for result in results:
        changed = changes(result)
        if result["method"] == Method.SPQR and len(changed) <= 1:
            found[" ".join(f"{part} {value}" for part, value in changed.items())] = result
    return dict(sorted(found.items()))


def changes(result: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a result that are not the default; `stats_bits` stands for both widths of statistics."""
    return {
        "stats_bits" if name in ("scale_bits", "zero_bits") else name: result[name]
        for name, value in _DEFAULTS.items()
        if name in result and name != "method" and result[name] != value
    }
