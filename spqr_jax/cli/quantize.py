"""The command `spqr quantize`."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from spqr_jax.cli import console, interrupts, settings
from spqr_jax.cli.options import Calibration, Json, Model, Seed, SequenceLength, Sequences, StoredType
from spqr_jax.cli.rules import Rule, RulesFile, Skip, read_rules
from spqr_jax.config import Method
from spqr_jax.storage.destination import check_outside
from spqr_jax.storage.paths import resolved

Destination = Annotated[Path, typer.Argument(parser=resolved, help="Directory to write.")]
HiddenOnDisk = Annotated[
    bool, typer.Option("--hidden-on-disk", help="Keep hidden states in memory-mapped files, not in memory.")
]
Overwrite = Annotated[bool, typer.Option(help="Replace a checkpoint at the destination.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Estimate time, memory and disk from two blocks, and write nothing.")
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="Run as one of several processes, see the README of spqr_jax.")
]


def quantize(
    source: Model,
    destination: Destination,
    preset: settings.PresetName = None,
    method: settings.MethodName = Method.SPQR,
    bits: settings.Bits = None,
    group_size: settings.GroupSize = None,
    stats_bits: settings.StatsBits = None,
    outlier_threshold: settings.OutlierThreshold = None,
    permutation: settings.Permutation = None,
    damping: settings.Damping = None,
    shrinkage: settings.Shrinkage = None,
    embedding_bits: settings.EmbeddingBits = None,
    target_bits: settings.TargetBits = None,
    mixed: settings.Mixed = False,
    target_size: settings.TargetSize = None,
    near_lossless: settings.NearLossless = False,
    skip: Skip = None,
    rule: Rule = None,
    rules: RulesFile = None,
    calibration: Calibration = None,
    sequences: Sequences = 32,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    hidden_on_disk: HiddenOnDisk = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    distributed: Distributed = False,
    dtype: StoredType = None,
    as_json: Json = False,
) -> None:
    """Quantize a model and save it, one block in memory at a time, on all devices.

    Finished blocks are kept in DESTINATION.partial: after an interruption, the same command resumes.

    Example: spqr quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-spqr
    """
    if distributed:
        _join_processes()
    chosen = settings.Settings(
        preset, method, bits, group_size, stats_bits, outlier_threshold, permutation, damping, shrinkage,
        embedding_bits, target_bits, mixed, target_size, near_lossless,
    )  # fmt: skip
    found = read_rules(skip, rule, rules)
    chosen.check(distributed=distributed, dry_run=dry_run, rules=bool(found))
    check_outside(destination, source)

    from spqr_jax.cli.models import mesh_of_all_devices, open_model
    from spqr_jax.cli.quantization import configuration, describe_run, estimated, prepare, run

    opened = open_model(source, dtype)
    mesh = mesh_of_all_devices()
    texts: dict[str, Any] = {"texts": calibration, "sequences": sequences, "length": sequence_length, "seed": seed}
    prepared = prepare(opened, destination, chosen, configuration(opened, chosen), mesh, **texts)
    options = {"mesh": mesh, "hidden_on_disk": hidden_on_disk, "overwrite": overwrite}
    if dry_run:
        console.emit(estimated(opened, destination, prepared, **options), as_json)
    elif (blocks := run(opened, destination, prepared, chosen, rules=found, **options)) is not None:
        console.emit(describe_run(destination, blocks, time.perf_counter() - prepared.started), as_json)


def _join_processes() -> None:
    """Joins the other processes of a distributed run, before anything else of JAX."""
    from spqr_jax.runtime.processes import end_on_interrupt, join

    end_on_interrupt(partial(interrupts.tell, resumes=True))
    join()
