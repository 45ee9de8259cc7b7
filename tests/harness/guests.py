"""The guests of this checkout, and small ones made on the spot."""

import struct
from pathlib import Path

from pyvmm.testing import images

BUILD = Path(__file__).parents[2] / "guests" / "build"
REAL = ("real-ticker", "real-halt", "real-pio", "real-rtc", "real-pv", "real-lint0")


def image(name):
    """Path of an image that ``make guests`` built."""
    path = BUILD / name
    assert path.exists(), f"{path} is missing; make guests"
    return path


def flat(folder, code):
    """A flat image of machine code, at most 510 bytes: entered at 0000:7c00 in real mode."""
    path = Path(folder) / "flat.bin"
    path.write_bytes(images.boot_sector(code))
    return path


def bzimage(folder, method, **header):
    """The checker of Linux's boot protocol as a bzImage, packed with a method."""
    elf = image("linux64.elf").read_bytes()
    # p_offset and p_filesz of its one segment: the code that runs unpacked runs packed too.
    (offset,), (size,) = (struct.unpack_from("<Q", elf, 64 + field) for field in (8, 32))
    code = elf[offset : offset + size]
    path = Path(folder) / f"bzImage-{method}"
    path.write_bytes(images.bzimage(images.pack(elf, method), code, **header))
    return path


def expect_verdict(machine, entered_as):
    """Wait for the checker's verdict, which must be good; what was printed on the way."""
    start = machine.seen
    verdict = machine.expect(r"linux64 (PASS as \w+|FAIL .*)\r\n")
    text = machine.serial[start : machine.seen].decode()
    assert verdict[1] == f"PASS as {entered_as}".encode(), text
    return text


def hash31(data):
    """What the checker prints of an initial RAM disk."""
    value = 0
    for byte in data:
        value = (value * 31 + byte) & 0xFFFF_FFFF
    return value


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
#: Has its kvmclock at PVCLOCK and never halts.
KVMCLOCK = (
    b"\x66\xb9\x01\x4d\x56\x4b"  # mov $MSR_KVM_SYSTEM_TIME_NEW, %ecx
    b"\x66\xb8\x01\x90\x00\x00\x66\x31\xd2\x0f\x30"  # mov $PVCLOCK | 1, %eax; wrmsr
    + print_text("clock\n")
    + SPIN
)
PVCLOCK = 0x9000


def stopped_flag(machine):
    """Whether KVM told the guest that it stood still: struct pvclock_vcpu_time_info, flags."""
    flags = machine.hmp(f"xp /xb {PVCLOCK + 29:#x}").split()[-1]
    return bool(int(flags, 16) & 2)
