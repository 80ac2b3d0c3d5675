"""Data sets of the Hugging Face hub, read by the package `datasets`."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pallas_kernels.errors import SpqrError

TIMEOUT = 10.0
"""Seconds until the hub counts as out of reach."""


@contextmanager
def hub_dataset(path: str, *, streaming: bool = False, **options: Any) -> Iterator[Any]:
    """A data set of the hub, opened by `datasets.load_dataset`.

    Args:
      path: repository of the data set.
      streaming: download rows as they are read, and nothing to the cache.
      options: of `load_dataset`.

    Raises:
      SpqrError: `datasets` is not installed, or the data cannot be read, also later inside the `with`.

    Example:
      >>> with hub_dataset("NeelNanda/pile-10k", split="train") as rows:  # doctest: +SKIP
      ...     rows[0]["text"]
    """
    load_dataset = _load_dataset()
    try:
        if streaming:
            # Imported here: every command imports this module, and importing the hub takes a tenth of a second.
            from huggingface_hub import dataset_info

            # Without a network this fails at once, where load_dataset tries again for 23 s and reports each time.
            dataset_info(path, timeout=TIMEOUT)
        yield load_dataset(path, streaming=streaming, **options)
    except Exception as error:  # of many types: of the network, of the hub, and of files in its cache
        raise SpqrError(
            f"{path} cannot be read by datasets: {type(error).__name__}: {error}; look at the network, or give a file"
        ) from error


def hub_rows(path: str, *, first: int, count: int | None, **options: Any) -> list[dict[str, Any]]:
    """Some rows of a data set, of which no more is downloaded than they need.

    Args:
      path: repository of the data set.
      first: index of the first row.
      count: number of rows; None for all that follow.
      options: of `load_dataset`.

    Raises:
      SpqrError: as `hub_dataset`.

    Example:
      >>> rows = hub_rows("NeelNanda/pile-10k", first=0, count=10, split="train")  # doctest: +SKIP
    """
    with hub_dataset(path, streaming=True, **options) as rows:
        return list(itertools.islice(rows, first, None if count is None else first + count))


def _load_dataset() -> Callable[..., Any]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise SpqrError("public texts are read by datasets, which is not installed: pip install datasets") from None
    return load_dataset
