"""Guest memory and ports, read and written by hand."""

from __future__ import annotations

from pyvmm.errors import CommandError, GuestError
from pyvmm.monitor.registry import Argument, Command, Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DUMP = 1 << 16
_PAGE = 4096


def read_memory(
    context: Context,
    address: int,
    size: int,
    physical: bool = False,
    cpu_index: int | None = None,
) -> str:
    """Return guest memory in hexadecimal, at a virtual address unless physical is true.

    Only memory is read, never a device. A page that is not there ends the read: what lies
    before it is returned; if nothing does, that is an error.
    """
    if not 0 < size <= MAX_DUMP:
        raise CommandError(f"{size} bytes at once are not possible; give 1 to {MAX_DUMP}")
    pages = []
    while size:
        address &= (1 << 64) - 1
        length = min(size, _PAGE - address % _PAGE)
        pages.append((address, length))
        address, size = address + length, size - length
    if not physical:
        pages = context.cpu(cpu_index).call(lambda vcpu: _translate(vcpu, pages))
    found = b""
    for gpa, length in pages:
        try:
            found += context.machine.memory.read(gpa, length)
        except GuestError:
            break
    if not found:
        raise CommandError("Cannot access memory")
    return found.hex()


def _translate(vcpu: Any, pages: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same pages by guest-physical address, up to the first that is not mapped."""
    found = []
    for gva, length in pages:
        gpa = vcpu.translate(gva)
        if gpa is None:
            break
        found.append((gpa, length))
    return found


def read_port(context: Context, port: int, size: int) -> int:
    """Return a port's value, read as the guest would, side effects included; 1, 2 or 4 bytes."""
    _check_port(port, size)
    return int(context.machine.ports.read(port, size))


def write_port(context: Context, port: int, size: int, value: int) -> None:
    """Write to a port as the guest would; size is 1, 2 or 4 bytes."""
    _check_port(port, size)
    context.machine.ports.write(port, size, value & ((1 << 8 * size) - 1))


def _check_port(port: int, size: int) -> None:
    if size not in (1, 2, 4) or not 0 <= port <= 0x10000 - size:
        raise CommandError(f"No port access of {size} bytes at {port:#x} is possible")


_PORT = (
    Argument("port", "integer", "port number, 0 to 0xffff"),
    Argument("size", "integer", "1, 2 or 4 bytes"),
)

COMMANDS = (
    Command(
        "x-read-memory",
        read_memory,
        Argument("address", "integer", "first address"),
        Argument("size", "integer", f"bytes, at most {MAX_DUMP}"),
        Argument("physical", "boolean", "the address is guest-physical", optional=True),
        Argument("cpu-index", "integer", "whose page tables to use", optional=True),
        returns="str",
    ),
    Command("x-read-port", read_port, *_PORT, in_migrate=False, returns="int"),
    Command(
        "x-write-port",
        write_port,
        *_PORT,
        Argument("value", "integer", "its low bytes are written"),
        in_migrate=False,
    ),
)
