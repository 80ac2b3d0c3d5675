"""Files damaged at random: in their bytes, or in the values that they hold."""

import copy
import json
import struct
import zipfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = (0, 1, 2**7, 2**15 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 0.5, 1e308, -1e308, 10**30, -(10**400), 2**31, 2**63, 2**64, float("nan")),
    *("", "llama", "x" * 5000, "\0\ud800", "../..", [], {}, [None], [[[[1]]]], [0] * 5000, {"": {}}, {"a": [{}]}),
)


def damage(path: Path, random: Random) -> bool:
    """Damages a file, and says whether by its values, so that its checksums are right again."""
    content = path.read_bytes()
    by_value = None
    if path.suffix == ".json":
        by_value = _other_json
    elif path.suffix == ".safetensors":
        by_value = _other_safetensors
    elif content[:2] == b"PK":
        by_value = _other_torch
    if by_value is None or random.random() < 0.5:
        path.write_bytes(_other_bytes(content, random))
        return False
    path.write_bytes(by_value(content, random))
    return True


def _other_bytes(content: bytes, random: Random) -> bytes:
    """Cuts, flips, overwrites, repeats, takes out or adds some bytes, mostly where the file says what is in it."""
    places = range(len(content)) if random.random() < 0.3 else random.choice(_descriptions(content))
    start = random.choice(places)
    stop = min(start + random.choice((1, 2, 4, 8, 64, 1000)), len(content))
    changed = bytearray(content)
    match random.randrange(8):
        case 0:
            del changed[start:]
        case 1:
            for _ in range(random.randrange(1, 9)):
                changed[random.choice(places)] ^= 1 << random.randrange(8)
        case 2:
            changed[start:stop] = random.choice((b"\0", b"\xff")) * (stop - start)
        case 3:
            changed[start:stop] = random.randbytes(stop - start)
        case 4:
            number = struct.pack("<Q", random.choice(NUMBERS))[: random.choice((1, 2, 4, 8))]
            changed[start : start + len(number)] = number
        case 5:
            changed[start:start] = content[start:stop]
        case 6:
            del changed[start:stop]
        case 7:
            changed += random.randbytes(random.choice((1, 8, 100, 70000)))
    return bytes(changed)


def _descriptions(content: bytes) -> list[range]:
    """The parts of a file that are no weights, for damage to be as frequent there as among the weights."""
    size = len(content)
    if content[:4] == b"GGUF":
        return [range(24), range(size // 3)]
    if content[:2] == b"PK":
        with zipfile.ZipFile(BytesIO(content)) as archive:
            pickle = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            start = pickle.header_offset
            return [range(archive.start_dir, size), range(size - 98, size), range(start, start + pickle.file_size)]
    header = int.from_bytes(content[:8], "little")
    return [range(8), range(8, 8 + header)] if header < size else [range(size)]


def _other_json(content: bytes, random: Random) -> bytes:
    return json.dumps(_other_values(json.loads(content), random, VALUES)).encode()


def _other_safetensors(content: bytes, random: Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    header = _other_json(content[8:end], random)
    return struct.pack("<Q", len(header)) + header + content[end:]


def _other_torch(content: bytes, random: Random) -> bytes:
    import torch

    values = (
        *(*VALUES, torch.ones(()), torch.ones(0), torch.ones(3, dtype=torch.int8), torch.full((64, 64), torch.nan)),
        # The first of these looks like four terabytes.
        *(torch.ones(1).expand(2**20, 2**20), torch.ones(4, dtype=torch.complex64), torch.ones(2, 2).to_sparse()),
    )
    file = BytesIO()
    torch.save(_other_values(torch.load(BytesIO(content), weights_only=True), random, values), file)
    return file.getvalue()


def _other_values(tree: Any, random: Random, values: Sequence[Any]) -> Any:
    """Nested dicts and lists in which one to three values are others, or gone, or have another name."""
    tree = copy.deepcopy(tree)
    for _ in range(random.randrange(1, 4)):
        places = list(_places(tree))
        if not places:
            return random.choice(values)
        parent, key = random.choice(places)
        match random.randrange(5):
            case 0:
                del parent[key]
            case 1:
                other, other_key = random.choice(places)
                parent[key] = copy.deepcopy(other[other_key])
            case 2 if isinstance(parent, dict):
                parent[random.choice(("", "a.b.weight", f"{key}.weight", "__metadata__"))] = parent.pop(key)
            case _:
                parent[key] = copy.deepcopy(random.choice(values))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])
