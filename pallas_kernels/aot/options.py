"""Options that several commands have."""

import re

import typer

from pallas_kernels.aot.formats import Format


def parse_format(spelling: str) -> Format:
    """A format as an option's value."""
    try:
        return Format.parse(spelling)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_shape(text: str) -> tuple[int, int]:
    """A matrix's shape as an option's value: 4096x11008 has 4096 rows."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a shape; 4096 rows of 11008 weights are 4096x11008")
    return int(match[1]), int(match[2])
