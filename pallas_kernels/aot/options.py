"""Parsers for the values of command-line options."""

import re
from collections.abc import Callable, Collection

import typer

from pallas_kernels.aot.formats import Format
from pallas_kernels.errors import SpqrError


def parse_format(spelling: str) -> Format:
    """Parses a format such as 3b-g16-s3-o2%."""
    try:
        return Format.parse(spelling)
    except SpqrError as error:
        raise typer.BadParameter(str(error)) from None


def parse_shape(text: str) -> tuple[int, int]:
    """Parses (out, in) from a shape such as 4096x11008.

    Example:
      >>> parse_shape("4096x11008")
      (4096, 11008)
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a shape; write OUTxIN, such as 4096x11008")
    return int(match[1]), int(match[2])


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """A parser that accepts only these names.

    Example:
      >>> one_of(["h100", "a100"])("a100")
      'a100'
    """

    def parse(name: str) -> str:
        if name not in choices:
            raise typer.BadParameter(f"{name!r} is unknown; choose one of {', '.join(choices)}")
        return name

    return parse
