"""GGUF files: metadata and tensors, mapped and not trusted."""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ..read import gguf_parts

# By GGUFValueType's numbers; 8 and 9, strings and arrays, are read piece by piece.
_SCALARS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")
LONGEST = 1 << 26  # bytes of a header that is skimmed


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its name, type, shape (rows first, as in MLX) and bytes [rows, bytes per row]."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and the tensors (views of the mapped file) of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads little-endian values off a buffer and never past its end."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes; a ValueError if there are fewer."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError("the file ends too early")
        return self.data[start : self.position].tobytes()

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return str(self.take(self.integer(8)), "utf-8")

    def value(self) -> Any:
        """Return a metadata value: a type and then a scalar, a string, or a list of either."""
        kind = GGUFValueType(self.integer(4))
        if kind != GGUFValueType.ARRAY:
            return self.string() if kind == GGUFValueType.STRING else self.numbers(kind, 1)[0]
        kind, count = GGUFValueType(self.integer(4)), self.integer(8)
        if kind == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        return self.strings(count) if kind == GGUFValueType.STRING else self.numbers(kind, count)

    def strings(self, count: int) -> list[str]:
        return [self.string() for _ in range(count)]

    def numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        numbers: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return numbers


class _Skimmer(_Cursor):
    """Leaves lists of strings empty, since those of a vocabulary are most of the work; of bounded reach."""

    def take(self, size: int) -> bytes:
        if self.position + size > LONGEST:
            raise ValueError(f"its header is longer than {LONGEST >> 20} MiB")
        return super().take(size)

    def strings(self, count: int) -> list[str]:
        data: memoryview[int] = self.data[:LONGEST].data
        position = self.position
        for _ in range(count):
            position += 8 + int.from_bytes(data[position : position + 8], "little")
            if position > len(data):
                raise ValueError("the file ends too early")
        self.position = position
        return []


def read_gguf(path: Path, cursor: type[_Cursor] = _Cursor) -> GGUFFile:
    """Read the metadata of a GGUF file and map its tensors, those of a split model's other parts too.

    Nothing in the files is trusted.

    Raises:
        ValueError: not GGUF of version 2 or 3, truncated, or inconsistent; or a part is missing.
    """
    first = _read_part(path, cursor)
    if (count := first.metadata.get("split.count", 1)) in (0, 1):
        return first
    parts = gguf_parts(path)
    if count != len(parts):
        raise ValueError(
            f"{path} is one of the {count!r} parts of a model, but not named so: give back its name."
        )
    files = [first if part == path else _read_part(part, cursor) for part in parts]
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    numbers = [file.metadata.get("split.no") for file in files]
    total = files[0].metadata.get("split.tensors.count", len(tensors))
    whole = sum(len(file.tensors) for file in files) == len(tensors) == total  # none comes twice
    if numbers != list(range(len(parts))) or not whole:
        raise ValueError(
            f"{parts[0]} and its other {len(parts) - 1} parts do not belong together: get them again."
        )
    return GGUFFile(files[0].metadata, tensors)


def skim_gguf(path: Path) -> GGUFFile:
    """As ``read_gguf``, but lists of strings in the metadata are empty."""
    return read_gguf(path, _Skimmer)


def _read_part(path: Path, cursor: type[_Cursor]) -> GGUFFile:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(cursor(np.frombuffer(mapped, np.uint8)))
    except (ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}): get it again.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path.") from error


def _parse(cursor: _Cursor) -> GGUFFile:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not start with 'GGUF'")
    if (version := cursor.integer(4)) not in (2, 3):
        raise ValueError(f"version {version}, only 2 and 3 little-endian are supported")
    tensor_count, pair_count = cursor.integer(8), cursor.integer(8)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key!r} comes twice")
        metadata[key] = cursor.value()
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"alignment {alignment!r}")
    data = cursor.data[-(-cursor.position // alignment) * alignment :]
    tensors = {info[0]: _map_tensor(data, *info) for info in infos}
    if len(tensors) != len(infos):
        raise ValueError("a tensor comes twice")
    return GGUFFile(metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Read a tensor's name, type, shape and offset in the data."""
    name, dimensions = cursor.string(), cursor.integer(4)
    if not 1 <= dimensions <= 4:
        raise ValueError(f"{name!r} has {dimensions} dimensions")
    shape = tuple(cursor.integer(8) for _ in range(dimensions))[::-1]
    return name, cursor.integer(4), shape, cursor.integer(8)


def _map_tensor(
    data: npt.NDArray[np.uint8], name: str, number: int, shape: tuple[int, ...], offset: int
) -> GGUFTensor:
    kind = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block or 0 in shape:
        raise ValueError(f"{name!r} has shape {shape}, not blocks of {block}")
    rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
    end = offset + rows * row_bytes
    if end > len(data):
        raise ValueError(f"the file ends before the data of {name!r}")
    return GGUFTensor(name, kind, shape, data[offset:end].reshape(rows, row_bytes))
