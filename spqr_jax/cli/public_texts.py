"""Names of public texts, which `datasets` downloads from the Hugging Face hub."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from spqr_jax.cli.documents import joined_text
from spqr_jax.measure.hub import hub_rows

DOCUMENTS = 2000
"""Documents of one use of a large set: about a million tokens, and some megabytes to download."""


class Use(StrEnum):
    """Uses of a text, which never share documents."""

    CALIBRATION = "calibration"
    MEASURE = "measure"


class Part(NamedTuple):
    """Documents of a data set.

    Attributes:
      options: of `load_dataset`.
      first: index of the first document.
      documents: their number; None for all that follow.
    """

    options: Mapping[str, Any]
    first: int = 0
    documents: int | None = DOCUMENTS


class PublicText(NamedTuple):
    """A public set: its repository, and the documents of each use."""

    path: str
    parts: Mapping[Use, Part]


def _one_split(options: Mapping[str, Any]) -> dict[Use, Part]:
    """The first documents of a split for calibration, and those that follow to measure."""
    return {Use.CALIBRATION: Part(options), Use.MEASURE: Part(options, first=DOCUMENTS)}


def _splits(calibration: Mapping[str, Any], measure: Mapping[str, Any], count: int | None) -> dict[Use, Part]:
    return {Use.CALIBRATION: Part(calibration, documents=count), Use.MEASURE: Part(measure, documents=count)}


def _c4(split: str, parts: str) -> dict[str, Any]:
    return {"data_files": {split: f"en/c4-{split}.00000-of-{parts}.json.gz"}, "split": split}


WIKITEXT = {"name": "wikitext-2-raw-v1"}
# The hub's Parquet copy: `datasets` no longer runs the script that reads the original files.
PAJAMA = {"revision": "refs/convert/parquet", "split": "train"}

PUBLIC_TEXTS: Mapping[str, PublicText] = {
    "wikitext2": PublicText(
        "Salesforce/wikitext", _splits(WIKITEXT | {"split": "train"}, WIKITEXT | {"split": "test"}, None)
    ),
    "c4": PublicText("allenai/c4", _splits(_c4("train", "01024"), _c4("validation", "00008"), DOCUMENTS)),
    "pajama": PublicText("togethercomputer/RedPajama-Data-1T-Sample", _one_split(PAJAMA)),
    "refinedweb": PublicText("tiiuae/falcon-refinedweb", _one_split({"split": "train"})),
    "pile-10k": PublicText("NeelNanda/pile-10k", _one_split({"split": "train"})),
    "ultrachat": PublicText(
        "HuggingFaceH4/ultrachat_200k", _splits({"split": "train_sft"}, {"split": "test_sft"}, DOCUMENTS)
    ),
}
"""Public texts by the names that the options take."""


def public_text(name: str, use: Use, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """The documents of a public text, joined.

    Raises:
      SpqrError: `datasets` is not installed, the hub cannot be reached, or messages cannot be rendered.
    """
    path, parts = PUBLIC_TEXTS[name]
    part = parts[use]
    return joined_text(hub_rows(path, first=part.first, count=part.documents, **part.options), tokenizer, name)
