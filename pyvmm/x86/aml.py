"""AML (ACPI 6.5, chapter 20): the few terms that describe a machine's devices, as bytes.

Each function encodes one term, so a tree of calls reads like the ASL that iasl would print.
Left out: everything that a method could compute; names are single segments.
"""

from __future__ import annotations

import struct


def integer(value: int) -> bytes:
    """Return a constant in its shortest form, 0 to 2^64 - 1 (20.2.3)."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} has more than 64 bits")


def string(text: str) -> bytes:
    """Return an ASCII string (20.2.3)."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Return a plug and play id (three letters, four digits), packed into an integer (19.3.4)."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    packed = letters << 16 | int(text[3:], 16)
    return integer(int.from_bytes(packed.to_bytes(4, "big"), "little"))


def package(*elements: bytes) -> bytes:
    """Return a list of up to 255 objects (20.2.5.4)."""
    return b"\x12" + _with_length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Return a buffer of raw bytes (20.2.5.4)."""
    return b"\x11" + _with_length(integer(len(data)) + data)


def name(segment: str, value: bytes) -> bytes:
    """Return ``Name (segment, value)``."""
    return b"\x08" + path(segment) + value


def scope(segment: str, *terms: bytes) -> bytes:
    """Return ``Scope (segment) {terms}``."""
    return b"\x10" + _with_length(path(segment) + b"".join(terms))


def device(segment: str, *terms: bytes) -> bytes:
    """Return ``Device (segment) {terms}``."""
    return b"\x5b\x82" + _with_length(path(segment) + b"".join(terms))


def path(segment: str) -> bytes:
    """Return a name of up to four characters, which is padded with ``_`` (20.2.2)."""
    return segment.ljust(4, "_").encode("ascii")


# ---- resource descriptors (6.4), for _CRS -------------------------------------------------------


def resources(*descriptors: bytes) -> bytes:
    """Return ``ResourceTemplate () {descriptors}``; an end tag without checksum closes it."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io(first: int, count: int) -> bytes:
    """Return ``IO (Decode16, ...)``: a fixed range of ports."""
    start = first.to_bytes(2, "little")
    return b"\x47\x01" + start + start + bytes((1, count))


def irq(number: int) -> bytes:
    """Return ``IRQNoFlags``: an ISA interrupt, 0 to 15: edge, active high, not shared."""
    return b"\x22" + (1 << number).to_bytes(2, "little")


def interrupt(gsi: int, *, edge: bool) -> bytes:
    """Return ``Interrupt (ResourceConsumer, Edge or Level, ActiveHigh, Exclusive)`` by its GSI."""
    return b"\x89\x06\0" + bytes((0x03 if edge else 0x01, 1)) + gsi.to_bytes(4, "little")


def memory32(base: int, size: int) -> bytes:
    """Return ``Memory32Fixed (ReadWrite, base, size)``.

    :raises OverflowError: it lies above 4 GiB
    """
    return b"\x86\x09\0\x01" + base.to_bytes(4, "little") + size.to_bytes(4, "little")


def bus_numbers(first: int, last: int) -> bytes:
    """Return ``WordBusNumber (ResourceProducer, MinFixed, MaxFixed, ...)``."""
    return _space("H", 2, 0, first, last)


def io_window(first: int, last: int) -> bytes:
    """Return ``WordIO (ResourceProducer, ..., EntireRange)``: ports that are passed on."""
    return _space("H", 1, 3, first, last)


def memory_window(first: int, last: int) -> bytes:
    """Return ``DWordMemory`` or ``QWordMemory (ResourceProducer, ..., ReadWrite)``."""
    return _space("I" if last < 1 << 32 else "Q", 0, 1, first, last)


def _space(word: str, kind: int, flags: int, first: int, last: int) -> bytes:
    # Address space descriptors (6.4.3.5), by the size of their words.
    tag = {"H": 0x88, "I": 0x87, "Q": 0x8A}[word]
    body = struct.pack("<BBB", kind, 0x0C, flags)
    body += struct.pack(f"<5{word}", 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", tag, len(body)) + body


def _with_length(data: bytes) -> bytes:
    # PkgLength (20.2.4) counts itself; in its long forms the first byte has the number of those
    # that follow and the lowest four bits.
    if len(data) < 0x3F:
        return bytes((len(data) + 1,)) + data
    for more in (1, 2, 3):
        length = len(data) + 1 + more
        if length < 1 << 4 + 8 * more:
            return (
                bytes((more << 6 | length & 0xF,)) + (length >> 4).to_bytes(more, "little") + data
            )
    raise ValueError(f"a term of {len(data)} bytes is too long")
