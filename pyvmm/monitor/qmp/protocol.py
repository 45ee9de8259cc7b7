"""QMP on the wire: bytes to JSON values, and replies and events to bytes.

Whoever connects may send anything: size and nesting are bounded before anything is parsed, and
what is no JSON is skipped up to the end of its line. QEMU's extensions of JSON (single quotes,
interpolation) are left out.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGE = 1 << 20
MAX_DIGITS = 309  # of an integer, which a double can have
MAX_DEPTH = 256  # well below the interpreter's own limit, which json runs into otherwise
_SPACE = b" \t\r\n"
_OPEN, _CLOSE = b"{[", b"}]"


class ProtocolError(Exception):
    """What came is no message; the text is for the client."""


class Splitter:
    """Finds where messages end in a stream that arrives in pieces of any size."""

    def __init__(self) -> None:
        #: What has come of the message that is not complete yet.
        self.partial = bytearray()
        #: Nothing is a message until the end of the line.
        self.skipping = False
        self._input = bytearray()
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, data: bytes) -> None:
        """Add what arrived."""
        self._input += data

    def waiting(self) -> bytes:
        """Return the bytes that were pushed and that :meth:`next` has not looked at."""
        return bytes(self._input)

    def next(self) -> bytes | None:
        """Return the next complete message, None if there is none yet.

        :raises ProtocolError: too large or too deep; the rest of its line will be skipped
        """
        at = 0
        while at < len(self._input):
            if self.skipping:
                at = self._input.find(b"\n", at) + 1 or len(self._input)
                self.skipping = self._input[at - 1] != 0x0A
                continue
            byte = self._input[at]
            at += 1
            if self._take(byte):
                del self._input[:at]
                message = bytes(self.partial)
                self._reset()
                return message
            if len(self.partial) > MAX_MESSAGE:
                self._fail(at, "JSON token size limit exceeded")
            if self._depth > MAX_DEPTH:
                self._fail(at, "JSON nesting depth limit exceeded")
        self._input.clear()
        return None

    def _take(self, byte: int) -> bool:
        """Look at one byte; return whether a message ends with it."""
        if not self.partial and byte in _SPACE:
            return False
        if byte == 0x0A and (self._in_string or self._depth == 0):
            return True  # no string goes over a line's end; a bare word ends with it
        self.partial.append(byte)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif byte == 0x5C:
                self._escaped = True
            elif byte == 0x22:
                self._in_string = False
        elif byte == 0x22:
            self._in_string = True
        elif byte in _OPEN:
            self._depth += 1
        elif byte in _CLOSE and self._depth:
            self._depth -= 1
            return self._depth == 0
        return False

    def _fail(self, at: int, problem: str) -> None:
        del self._input[:at]
        self._reset()
        self.skipping = True
        raise ProtocolError(problem)

    def _reset(self) -> None:
        self.partial.clear()
        self._depth = 0
        self._in_string = self._escaped = False


def decode(message: bytes) -> Any:
    """Return the JSON value of a message.

    :raises ProtocolError: it is none, or has what no command can use and no reply could
        repeat: numbers that are none or have no end, a key twice, half of a surrogate pair,
        a NUL
    """
    import json

    try:
        value = json.loads(
            message.decode(),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except json.JSONDecodeError as error:
        where = f"{error.lineno}:{error.colno}"
        raise ProtocolError(f"{where}: JSON parse error, {error.msg.lower()}") from None
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"JSON parse error, {error}") from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise ProtocolError("JSON parse error, a string contains NUL")
    return value


def encode(message: object, pretty: bool = False) -> bytes:
    """Return a message as one line, or with ``pretty`` as several.

    Half of a surrogate pair, of a file name that is no text, becomes U+FFFD, as in QEMU.

    :raises ValueError: if it has what JSON has not: a number that is none
    """
    import json

    indent = 4 if pretty else None
    text = json.dumps(message, indent=indent, allow_nan=False)
    if "\\ud" in text:
        text = json.dumps(_whole(message), indent=indent, allow_nan=False)
    return text.replace("\n", "\r\n").encode() + b"\r\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _whole(value: Any) -> Any:
    """Return the same value without halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole(key): _whole(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(inner) for inner in value]
    return value


def _finite(text: str) -> float:
    # float() takes 1e999, which json would write as Infinity.
    value = float(text)
    if value - value:
        raise ValueError("a number is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number is too large")
    return int(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
