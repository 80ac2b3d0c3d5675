"""Files of text."""

import codecs
from pathlib import Path

from pallas_kernels.errors import SpqrError

# Those of UTF-32 first, because one of them begins with one of UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

LATIN_SHARE = 0.25
"""Largest share of bytes over 0x7f in texts of Western European languages; Cyrillic and Chinese texts have more."""


def read_text(file: Path) -> str:
    """The content of a text file in UTF-8, with or without a byte-order mark; each end of a line is a newline.

    Raises:
      SpqrError: the file is in another encoding, which is named where it can be recognized, or is no text.
    """
    content = file.read_bytes()
    if encoding := _encoding_with_zeros(content):
        raise SpqrError(f"{file} is a text in {encoding}, not in UTF-8: convert it, as iconv -f {encoding} -t UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpqrError(
            f"{file} is not a text in UTF-8: byte {content[error.start]:#04x} at offset {error.start}{_guess(content)}"
        ) from None
    if "\0" in text:
        raise SpqrError(f"{file} is not a text: it has a zero byte at offset {content.index(0)}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding_with_zeros(content: bytes) -> str | None:
    """The encoding of a text that has a byte-order mark of UTF-16 or UTF-32, or zeros in place of high bytes."""
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return encoding
    low_first, high_first = (content[start::2].count(0) for start in (1, 0))
    # In a text in UTF-16 without a mark, spaces and ASCII letters have a zero on the same side.
    if min(low_first, high_first) == 0 and max(low_first, high_first) > len(content) // 8:
        return "UTF-16LE" if low_first else "UTF-16BE"
    return None


def _guess(content: bytes) -> str:
    high = sum(byte > 0x7F for byte in content)
    if high > LATIN_SHARE * len(content) or 0 in content:
        return ": convert it to UTF-8"
    return ", perhaps in Windows-1252 (Latin-1): convert it, as iconv -f WINDOWS-1252 -t UTF-8"
