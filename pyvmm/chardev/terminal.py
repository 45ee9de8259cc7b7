"""Terminal modes: raw for a guest, and back again.

The modes that the user had are carried over a live update as :data:`STATE_SIZE` bytes,
because the new image finds the terminal raw already.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios

from pyvmm.errors import VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # As termios has it: iflag, oflag, cflag, lflag, ispeed, ospeed, control characters.
    Modes = list[Any]

_NCCS = 32
_LAYOUT = struct.Struct(f"<6I{_NCCS}s")
STATE_SIZE = _LAYOUT.size
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _ISPEED, _OSPEED, _CC = range(7)


def raw_modes(modes: Modes, *, signals: bool, output: bool) -> Modes:
    """Return *modes* with every key passed on at once and unchanged.

    :param signals: whether Ctrl-C, Ctrl-Z and Ctrl-\\ still make signals
    :param output: whether the terminal may still turn a newline into CR and newline, as a
        guest's console expects it to
    """
    raw = list(modes)
    raw[_IFLAG] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    if not output:
        raw[_OFLAG] &= ~termios.OPOST
    raw[_CFLAG] = raw[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
    if not signals:
        raw[_LFLAG] &= ~termios.ISIG
    raw[_CC] = list(modes[_CC])
    raw[_CC][termios.VMIN] = 1
    raw[_CC][termios.VTIME] = 0
    return raw


def get_modes(fd: int) -> Modes:
    """Return the present modes.

    :raises OSError: if it is no terminal, or no more
    """
    try:
        return termios.tcgetattr(fd)
    except termios.error as error:
        raise OSError(*error.args) from None


def set_modes(fd: int, modes: Modes) -> None:
    """Set modes at once: waiting for output to drain could wait for a stopped terminal.

    :raises OSError: if it is no terminal, or no more
    """
    try:
        termios.tcsetattr(fd, termios.TCSANOW, modes)
    except termios.error as error:
        raise OSError(*error.args) from None


def makes_signals(fd: int) -> bool:
    """Return whether Ctrl-C makes a signal now; False for what is no terminal any more."""
    try:
        return bool(get_modes(fd)[_LFLAG] & termios.ISIG)
    except OSError:
        return False


def pack_modes(modes: Modes) -> bytes:
    """Return modes as bytes, for :func:`unpack_modes` in another image."""
    keys = bytes(key if isinstance(key, int) else key[0] for key in modes[_CC])
    return _LAYOUT.pack(*modes[:_CC], keys.ljust(_NCCS, b"\0"))


def unpack_modes(state: bytes, path: str) -> Modes:
    """Return the modes in bytes that need not be trusted.

    :param path: names the state in errors
    :raises VmStateError: if they are of another size
    """
    if len(state) != STATE_SIZE:
        raise VmStateError(path, f"terminal modes of {len(state)} bytes, not {STATE_SIZE}")
    *flags, keys = _LAYOUT.unpack(state)
    cc: list[bytes | int] = [keys[at : at + 1] for at in range(_NCCS)]
    if not flags[_LFLAG] & termios.ICANON:
        # termios has these two as numbers unless lines are edited.
        cc[termios.VMIN] = keys[termios.VMIN]
        cc[termios.VTIME] = keys[termios.VTIME]
    return [*flags, cc]


def window_size(fd: int) -> tuple[int, int]:
    """Return rows and columns; 24 and 80 for what has no size."""
    if not is_terminal(fd):
        return 24, 80
    try:
        packed = fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return 24, 80
    rows, columns = struct.unpack_from("HH", packed)
    return rows or 24, columns or 80


def is_hung_up(fd: int) -> bool:
    """Return whether nobody is at the other end any more."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def is_terminal(fd: int) -> bool:
    """Return whether a descriptor is a terminal; False for a closed one."""
    return os.isatty(fd)
