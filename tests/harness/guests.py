"""The guests of this checkout, and small ones made on the spot."""

from pathlib import Path

BUILD = Path(__file__).parents[2] / "guests" / "build"
REAL = ("real-ticker", "real-halt", "real-pio", "real-rtc")


def image(name):
    """Path of an image that ``make guests`` built."""
    path = BUILD / name
    assert path.exists(), f"{path} is missing; make guests"
    return path


def flat(folder, code):
    """A flat image of machine code: entered at 0000:7c00 in real mode."""
    path = Path(folder) / "flat.bin"
    path.write_bytes(code)
    return path


def rom(folder, code, size=0x10000):
    """A ROM whose last 64 KiB are seen at f000:0000, where it goes on from the reset vector."""
    reset_vector = b"\xea\x00\x00\x00\xf0"  # ljmp $0xf000, $0
    data = bytearray(b"\xf4" * size)
    data[size - 0x10000 : size - 0x10000 + len(code)] = code
    data[-16 : -16 + len(reset_vector)] = reset_vector
    path = Path(folder) / "rom.bin"
    path.write_bytes(data)
    return path


def print_text(text, port=0x3F8):
    """16-bit code that writes ``text`` to a port."""
    setup = b"\xba" + port.to_bytes(2, "little")  # mov $port, %dx
    return setup + b"".join(bytes((0xB0, byte, 0xEE)) for byte in text.encode())  # mov, out


def out8(port, value):
    """16-bit code: out."""
    return b"\xba" + port.to_bytes(2, "little") + bytes((0xB0, value, 0xEE))


HALT = b"\xfa\xf4\xeb\xfd"  # cli; 1: hlt; jmp 1b (whatever wakes it)
SPIN = b"\xeb\xfe"  # 1: jmp 1b
TO_UNMAPPED = b"\xea\x00\x00\x00\xa0"  # ljmp $0xa000, $0: code where there is no memory
