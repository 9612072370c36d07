"""The tensors of a folder of safetensors, read one at a time into memory of their own.

Not through a memory map: what was read and dropped is gone at once, so the peak that the system reports is the peak that there was.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.core import WeftError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
MOST_PINNED = 1 << 28  # bytes; what is pinned stays so
PIECE, READERS = 1 << 24, 4  # bytes that one thread reads at a time: a thread copies from the page cache at a quarter of what memory allows
LONGEST_HEADER = 100 << 20  # bytes; what safetensors itself allows


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: bytes start..end of a file."""

    file: Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards(Mapping[str, Place]):
    """Every tensor of a model's folder by name; nothing but headers has been read.

    Raises:
        WeftError: a shard is missing, truncated or no safetensors file; every such shard is named.
    """

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Place] = {}
        wrong: list[str] = []
        for file in _files(folder):
            try:
                self.places |= _header(file)
            except WeftError as e:
                wrong.append(str(e))
        if wrong:
            raise WeftError("\n".join(wrong) + "\nDownload it again.")
        self.bytes = sum(p.end - p.start for p in self.places.values())

    def __getitem__(self, name: str) -> Place:
        return self.places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, name: str, pinned: bool = False) -> Tensor:
        """The tensor, in its own memory on the CPU. Raises WeftError if it holds NaN or Inf.

        pinned: it will go to a card, so in pinned memory, unless it is large. torch uses that again for the next tensor, where pages of
        fresh memory take three times as long as reading, and the copy from it needs no stop on the way. NaN and Inf are then looked for by
        `check` on the card, which reads a hundred times as fast.
        """
        place = self.places[name]
        size = place.end - place.start
        raw = torch.empty(size, dtype=torch.uint8, pin_memory=pinned and size <= MOST_PINNED)
        pieces = [slice(i, min(i + PIECE, size)) for i in range(0, size, PIECE)]
        with ThreadPoolExecutor(READERS) if len(pieces) > 1 else nullcontext() as threads:
            each = map if threads is None else threads.map
            if not all(each(partial(_fill, memoryview(raw.numpy()), place), pieces)):
                raise WeftError(f"{place.file} is truncated: {name} ends beyond the file. Download it again.")
        value = raw.view(place.dtype).view(place.shape) if len(raw) else torch.empty(place.shape, dtype=place.dtype)
        if not pinned:
            self.check(name, value)
        return value

    def check(self, name: str, value: Tensor) -> None:
        """Raises WeftError if a tensor that was read holds NaN or Inf."""
        if value.numel() and value.is_floating_point() and value.element_size() > 1 and not finite(value):
            where = f" ({self.places[name].file.name})" if name in self.places else ""
            raise WeftError(f"{name}{where} holds NaN or Inf: such a weight cannot be used. Take an intact checkpoint.")


def _fill(into: memoryview, place: Place, piece: slice) -> bool:
    """Read a piece of a tensor's bytes; whether all of it was there."""
    with place.file.open("rb", buffering=0) as f:
        f.seek(place.start + piece.start)
        at = piece.start
        while at < piece.stop:
            got = f.readinto(into[at : piece.stop])
            if not got:
                return False
            at += got
    return True


def finite(value: Tensor) -> bool:
    """Whether all of it is; without a second tensor of its size."""
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when transformers asks for it by `lazy[...]`, and not kept."""

    make: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        value = self.make()
        return value if index is ... else value[index]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as e:
        raise WeftError(f"{index} is no index of shards: {e!r}") from None
    if gone := [n for n in names if not (folder / n).is_file()]:
        raise WeftError(f"{folder} lacks {len(gone)} of its {len(names)} shards: {', '.join(gone[:5])}. Download them.")
    return [folder / n for n in names]


def _header(file: Path) -> dict[str, Place]:
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else LONGEST_HEADER + 1
        if length > min(LONGEST_HEADER, max(size - 8, 0)):
            raise WeftError(f"{file} is truncated, or no safetensors file: its header does not fit in its {size:,} bytes")
        try:
            entries = json.loads(f.read(length))
            entries.pop("__metadata__", None)
            first = 8 + length
            found = {
                name: Place(file, first + e["data_offsets"][0], first + e["data_offsets"][1], DTYPES[e["dtype"]], tuple(e["shape"]))
                for name, e in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeftError(f"{file} is no safetensors file that weft can read: {e!r}") from None
    end = max((p.end for p in found.values()), default=first)
    if end > size:
        raise WeftError(f"{file} is truncated: its header tells of {end:,} bytes, and there are {size:,}")
    return found
