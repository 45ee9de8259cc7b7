"""The CPR state: what a new image must know before it makes anything.

It is a memfd that the user never sees; its number is in the environment of the new image.
The list of preserved descriptors has QEMU's layout (magic, version, then name, id and number
of each). Behind it stands a subsection of pyvmm's own with host-side values that belong to
no device: terminal modes, half-typed lines, times. What is read here is checked like any
other input.
"""

from __future__ import annotations

import os
import struct

from pyvmm.errors import VmStateError
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import SUBSECTION

ENVIRONMENT = "PYVMM_CPR_EXEC_STATE"
MAGIC = 0x51435052  # "QCPR"
VERSION = 1
VALUES = b"CprState/pyvmm values"
VALUES_VERSION = 1
MAX_SIZE = 64 << 20
MAX_ENTRIES = 4096
MAX_NAME = 256


class CprState:
    """What goes from one image to the next.

    :ivar fds: descriptors by (name, id)
    :ivar values: host-side state by name
    """

    __slots__ = ("fds", "values")

    def __init__(self, fds: dict[tuple[str, int], int], values: dict[str, bytes]) -> None:
        self.fds = fds
        self.values = values


def encode(state: CprState) -> bytes:
    """Return the bytes of the memfd."""
    out = bytearray(struct.pack(">II", MAGIC, VERSION))
    for (name, index), fd in state.fds.items():
        raw = name.encode() + b"\0"
        out += struct.pack(">BI", 1, len(raw)) + raw + struct.pack(">ii", index, fd)
    out += struct.pack(">BBB", 0, SUBSECTION, len(VALUES)) + VALUES
    out += struct.pack(">I", VALUES_VERSION)
    for name, value in state.values.items():
        raw = name.encode() + b"\0"
        out += struct.pack(">BI", 1, len(raw)) + raw + struct.pack(">I", len(value)) + value
    out.append(0)
    return bytes(out)


def decode(data: bytes) -> CprState:
    """Return the state that :func:`encode` wrote.

    :raises VmStateError: on anything else
    """
    source = Cursor(data)
    source.path.append("CPR state")
    if source.u32() != MAGIC:
        raise source.error("bad magic")
    version = source.u32()
    if version != VERSION:
        raise source.error(f"version {version} is not supported")
    state = CprState({}, {})
    while (name := _name(source, len(state.fds))) is not None:
        index, fd = struct.unpack(">ii", source.take(8))
        if (name, index) in state.fds:
            raise source.error(f"{name}[{index}] is there twice")
        if fd <= 2 or fd in state.fds.values():
            raise source.error(f"{name}[{index}] cannot be descriptor {fd}")
        state.fds[(name, index)] = fd
    if source.u8() != SUBSECTION or source.take(source.u8()) != VALUES:
        raise source.error("the host-side values are missing")
    if source.u32() != VALUES_VERSION:
        raise source.error("host-side values of another version")
    while (name := _name(source, len(state.values))) is not None:
        if name in state.values:
            raise source.error(f"value {name} is there twice")
        state.values[name] = source.take(source.u32())
    if source.at != len(data):
        raise source.error("something follows the end")
    return state


def inherit(*, keep: bool = False) -> CprState | None:
    """Return the state that this process was born with, or None if it was started afresh.

    The variable leaves the environment, so that neither helpers nor the next update see it.

    :param keep: leave the state's descriptor open, for a way back
    :raises VmStateError: if it names no readable state
    """
    text = os.environ.pop(ENVIRONMENT, None)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) <= 2:
        raise VmStateError("CPR state", f"{ENVIRONMENT}={text!r} is no descriptor")
    fd = int(text)
    try:
        # A pipe or a terminal would block; only a file has a size.
        size = os.fstat(fd).st_size
        if size > MAX_SIZE:
            raise VmStateError("CPR state", f"{size} bytes, at most {MAX_SIZE} are possible")
        data = os.pread(fd, size, 0) if size else b""
        if keep:
            os.set_inheritable(fd, False)
        else:
            os.close(fd)
    except OSError as error:
        raise VmStateError("CPR state", f"descriptor {fd}: {error.strerror}") from None
    state = decode(data)
    for key, inherited in state.fds.items():
        try:
            os.set_inheritable(inherited, False)
        except OSError:
            name = f"{key[0]}[{key[1]}]"
            raise VmStateError("CPR state", f"{name}: descriptor {inherited} is missing") from None
    return state


def reserve() -> int:
    """Return the descriptor of an empty memfd for a state, which exec closes unless the caller
    makes it inheritable."""
    return os.memfd_create("cpr-state", os.MFD_CLOEXEC)


def write(fd: int, fds: dict[tuple[str, int], int], values: dict[str, bytes]) -> None:
    """Write the state for the next image into an empty memfd.

    :raises VmStateError: if it is nothing that the next image could read
    """
    data = encode(CprState(fds, values))
    # What is wrong with it must be found before the exec.
    decode(data)
    if len(data) > MAX_SIZE:
        raise VmStateError("CPR state", f"{len(data)} bytes, at most {MAX_SIZE} are possible")
    while data:
        data = data[os.write(fd, data) :]


def publish(fds: dict[tuple[str, int], int], values: dict[str, bytes]) -> int:
    """Do both; return the descriptor.

    :raises VmStateError: as :func:`write`
    """
    fd = reserve()
    try:
        write(fd, fds, values)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _name(source: Cursor, count: int) -> str | None:
    # The name of the next element of a list, None at its end.
    more = source.u8()
    if more == 0:
        return None
    if more != 1 or count >= MAX_ENTRIES:
        raise source.error("a list does not end where it should")
    size = source.u32()
    raw = source.take(size) if 1 < size <= MAX_NAME else b""
    if raw[-1:] != b"\0" or not raw.isascii() or b"\0" in raw[:-1]:
        raise source.error(f"a name of {size} bytes is malformed")
    return raw[:-1].decode("ascii")
