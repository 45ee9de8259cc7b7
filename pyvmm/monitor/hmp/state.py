"""What a human monitor carries over a live update, whichever way it is shown."""

from __future__ import annotations

import struct

from pyvmm.errors import VmStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.monitor.registry import Context

MAX_LINE = 4096
MAX_OUTPUT = 1 << 20

# What a live update carries over: version, flags, current CPU, place of the cursor in the line;
# then the lengths of the three texts that follow.
_HEAD = struct.Struct(">BBHH3I")
_VERSION = 2
OWES_PROMPT, OVERLONG, AFTER_CR, GREETED = 1, 2, 4, 8
_ALL_FLAGS = 15


class MonitorState:
    """What a monitor carries over a live update.

    ``line`` is what is typed but not entered, ``input`` what is taken but not looked at,
    ``output`` what is not written yet. ``cursor`` counts characters of the line.
    """

    __slots__ = ("cpu_index", "cursor", "flags", "input", "line", "output")

    def __init__(
        self,
        line: bytes = b"",
        input: bytes = b"",
        output: bytes = b"",
        flags: int = 0,
        cpu_index: int = 0,
        cursor: int = 0,
    ) -> None:
        self.line = line
        self.input = input
        self.output = output
        self.flags = flags
        self.cpu_index = cpu_index
        self.cursor = cursor

    def pack(self) -> bytes:
        """Return the state as bytes."""
        texts = (self.line, self.input, self.output)
        head = _HEAD.pack(_VERSION, self.flags, self.cpu_index, self.cursor, *map(len, texts))
        return head + b"".join(texts)

    @classmethod
    def unpack(cls, state: bytes) -> MonitorState:
        """Return the state in what :meth:`pack` made.

        :raises VmStateError: it did not
        """
        if len(state) < _HEAD.size:
            raise VmStateError("monitor", f"{len(state)} bytes are too few")
        version, flags, cpu_index, cursor, *sizes = _HEAD.unpack_from(state)
        if version != _VERSION:
            raise VmStateError("monitor", f"version {version} is not known")
        if flags & ~_ALL_FLAGS:
            raise VmStateError("monitor", f"flags {flags:#x} are not known")
        limits = (MAX_LINE, MAX_LINE, MAX_OUTPUT)
        if any(size > limit for size, limit in zip(sizes, limits, strict=True)):
            raise VmStateError("monitor", "a text is too long")
        if len(state) != _HEAD.size + sum(sizes):
            raise VmStateError("monitor", f"{len(state)} bytes do not hold texts of {sizes}")
        texts, at = [], _HEAD.size
        for size in sizes:
            texts.append(state[at : at + size])
            at += size
        line, input, output = texts
        return cls(line, input, output, flags, cpu_index, cursor)

    def restore_context(self, context: Context) -> None:
        """Give the monitor its current CPU back.

        :raises VmStateError: the machine has no such CPU
        """
        if self.cpu_index >= len(context.machine.cpus):
            raise VmStateError("monitor", f"there is no CPU #{self.cpu_index}")
        context.cpu_index = self.cpu_index
