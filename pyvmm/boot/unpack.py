"""Unpacks the payload of a bzImage: what the kernel's own decompressor would do, at host speed.

Formats by their magic numbers (boot.rst, payload_offset): gzip, bzip2, lzma, xz, lz4 (the legacy
frame) and zstd, by library code. The payload is hostile: its last four bytes declare the unpacked
size, no more than that is produced, and dictionaries are bounded. Fresh boots and resets only;
each format imports its own library.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.boot.blob import Blob

UNPACKED_MAX = 512 << 20
"""Largest kernel in bytes; distributions' have 50 to 70 MiB."""

_DICTIONARY_MAX = 128 << 20  # the largest that Linux packs itself with
_LZ4_BLOCK = 8 << 20
"""What each block of the legacy frame holds unpacked; only the last may hold less."""


def is_known(payload: bytes) -> bool:
    """Return whether :func:`unpack` knows the format that *payload* begins as."""
    return any(payload.startswith(magic) for magic in _FORMATS)


def prepare(payload: bytes) -> None:
    """Import what unpacking *payload* takes: later the library may be another, or none."""
    for magic, (name, _) in _FORMATS.items():
        if payload.startswith(magic):
            __import__(_LIBRARIES[name])


def unpack(blob: Blob, payload: bytes) -> bytes:
    """Return the kernel that *payload*, of a known format, holds.

    :param blob: what the payload is of, for errors
    :raises ConfigError: it is damaged, or larger than :data:`UNPACKED_MAX`
    """
    name, function = next(_FORMATS[magic] for magic in _FORMATS if payload.startswith(magic))
    # gzip ends like this by itself; Linux's build appends it to the other formats.
    size = int.from_bytes(payload[-4:], "little")
    if max(size, len(payload)) > UNPACKED_MAX:
        raise blob.error(f"a payload of {size} bytes, which no kernel has; it is damaged")
    try:
        data = function(payload, size)
    except Exception as error:  # each library has its own, without a common base
        raise blob.error(f"the {name} payload cannot be unpacked ({error})") from error
    if len(data) != size:
        raise blob.error(f"the {name} payload does not unpack to {size} bytes; it is damaged")
    return data


# Each asks for one byte more than declared: too much is seen, and so is the end of the stream,
# where the checksum is.


def _gzip(payload: bytes, size: int) -> bytes:
    import zlib

    stream = zlib.decompressobj(wbits=31)
    data = stream.decompress(payload, size + 1)
    return data if stream.eof else b""


def _bzip2(payload: bytes, size: int) -> bytes:
    import bz2

    stream = bz2.BZ2Decompressor()
    data = stream.decompress(payload, size + 1)
    return data if stream.eof else b""


def _lzma(payload: bytes, size: int) -> bytes:
    import lzma

    # The decoder has tables beside its dictionary.
    stream = lzma.LZMADecompressor(memlimit=_DICTIONARY_MAX + (1 << 20))
    data = stream.decompress(payload, size + 1)
    return data if stream.eof else b""


def _lz4(payload: bytes, size: int) -> bytes:
    import lz4.block

    rest = memoryview(payload)[4:]
    blocks: list[bytes] = []
    left = size
    while left:
        end = 4 + int.from_bytes(rest[:4], "little")
        expected = min(left, _LZ4_BLOCK)
        block: bytes = lz4.block.decompress(rest[4:end], uncompressed_size=expected)
        # A shorter block would let the number of blocks grow without bound.
        if len(block) != expected or end > len(rest):
            return b""
        blocks.append(block)
        left -= expected
        rest = rest[end:]
    return b"".join(blocks)


def _zstd(payload: bytes, size: int) -> bytes:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_DICTIONARY_MAX)
    with decompressor.stream_reader(payload, read_across_frames=False) as stream:
        return stream.read(size + 1)


_FORMATS: dict[bytes, tuple[str, Callable[[bytes, int], bytes]]] = {
    b"\x1f\x8b": ("gzip", _gzip),
    b"BZh": ("bzip2", _bzip2),
    b"\x5d\0\0": ("lzma", _lzma),
    b"\xfd7zXZ\0": ("xz", _lzma),
    b"\x02\x21\x4c\x18": ("lz4", _lz4),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}

_LIBRARIES = {
    "gzip": "zlib",
    "bzip2": "bz2",
    "lzma": "lzma",
    "xz": "lzma",
    "lz4": "lz4.block",
    "zstd": "zstandard",
}
