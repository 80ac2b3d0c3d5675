"""Rules on the command line and in files."""

from pathlib import Path

import pytest

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.rules import read_rules

FILE = """
[[rule]]
match = "layers_0.*"
bits = 8
outlier_threshold = "none"

[[rule]]
match = "layers_1.down_proj"
skip = true
"""


def test_skips_come_first_and_the_file_last(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(FILE)
    assert read_rules(["a.*"], ["b.*: bits=4, damping=0.25, fit=error", "c: simplified = true"], file) == [
        ("a.*", None),
        ("b.*", {"bits": 4, "damping": 0.25, "fit": "error"}),
        ("c", {"simplified": True}),
        ("layers_0.*", {"bits": 8, "outlier_threshold": None}),
        ("layers_1.down_proj", None),
    ]


@pytest.mark.parametrize("text", ["layers_0.*", ": bits=8", "a: bits", "a: =8", "a: bits=8,", ""])
def test_a_rule_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SpqrError, match="cannot be read: give pattern and settings"):
        read_rules(None, [text], None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[rule]", "cannot be read as TOML"),
        ("", r"must hold tables \[\[rule\]\]"),
        ("bits = 3", r"must hold tables \[\[rule\]\]"),
        ("[rule]\nmatch = 'a'", r"must hold tables \[\[rule\]\]"),
        ("[[rule]]\nbits = 3", r"each \[\[rule\]\] needs a match"),
        ("[[rule]]\nmatch = 'a'", "either settings or skip"),
        ("[[rule]]\nmatch = 'a'\nskip = true\nbits = 3", "either settings or skip"),
    ],
)
def test_a_file_that_cannot_be_read(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(SpqrError, match=named):
        read_rules(None, None, file)
    with pytest.raises(SpqrError, match="cannot be read as TOML"):
        read_rules(None, None, tmp_path / "none.toml")
