"""IDX files, the format MNIST and its relatives are published in.

An IDX file is two zero bytes, a type code, the number of dimensions, each dimension as a
big-endian uint32, then the big-endian values in C order.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_GZIP_MAGIC = b"\x1f\x8b"
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_DIMS = 32  # numpy 1's limit, and far above any data set's


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file, gzipped (by its name or its first bytes) or plain.

    Args:
        path: the file.
    Returns:
        A writable array of the file's shape, in native byte order; dtype uint8, int8, int16,
        int32, float32 or float64, as the file's type code says.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not gzip where the name says so, damaged gzip, bad magic bytes, a payload
            that is too short or too long.
    """
    path = Path(path)
    raw = _read_bytes(path)
    dtype, shape, start = _parse_header(path, raw)
    expected = math.prod(shape) * dtype.itemsize
    found = len(raw) - start
    if found != expected:
        kind = "truncated" if found < expected else "trailing bytes"
        raise ValueError(
            f"{path}: {kind}: expected {expected} bytes of data for shape {list(shape)}"
            f" {dtype.name}, got {found}"
        )
    values = np.frombuffer(raw, dtype=dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _read_bytes(path: Path) -> bytes:
    """The file's bytes, decompressed if it is gzipped."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"{path}: expected an IDX file, found {found}")
    raw = path.read_bytes()
    gzipped = raw.startswith(_GZIP_MAGIC)
    if not gzipped and path.suffix != ".gz":
        return raw
    if not gzipped:
        raise ValueError(
            f"{path}: expected gzip data (first bytes 1f 8b), got {raw[:2].hex(' ') or 'nothing'}"
        )
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected whole gzip data, got a damaged file: {error}") from None


def _parse_header(path: Path, raw: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type, shape and the offset of the first value."""
    magic = raw[:4]
    well_formed = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in _DTYPES
    if not (well_formed and 1 <= magic[3] <= _MAX_DIMS):
        codes = ", ".join(f"{code:02x}" for code in _DTYPES)
        raise ValueError(
            f"{path}: bad magic: expected 00 00, a type code ({codes}) and 1 to {_MAX_DIMS}"
            f" dimensions, got {magic.hex(' ') or 'nothing'}"
        )
    ndim = magic[3]
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise ValueError(f"{path}: truncated: expected a header of {start} bytes, got {len(raw)}")
    shape = tuple(int(n) for n in np.frombuffer(raw, dtype=">u4", count=ndim, offset=4))
    return np.dtype(_DTYPES[magic[2]]), shape, start
