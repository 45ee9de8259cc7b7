"""What is typed at the prompt: words, switches, numbers, expressions, and /formats.

An argument list is described as in QEMU's command tables: ``name:type`` separated by commas.
Types: ``s`` a word (in double quotes if it holds spaces), ``S`` the rest of the line, ``i`` a
32-bit and ``l`` a 64-bit expression, ``b`` on or off, ``/`` a dump format, ``-x`` a switch;
``?`` behind a type makes it optional, and so does ``.``, with a dot to be typed before it.
Lines come from anybody who reaches the monitor: their length is bounded by the front ends, the
nesting of expressions here.
"""

from __future__ import annotations

from pyvmm.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_MASK = (1 << 64) - 1
_MAX_NESTING = 64
_MAX_DIGITS = 64
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_SIZES = {"b": 1, "h": 2, "w": 4, "l": 4, "g": 8}
_SPACE = " \t\r\n\v\f"


class ParseError(CommandError):
    """The line is not what the command takes; the text is shown as it is."""


class Format:
    """What follows ``/``: how many, how shown (``x d u o c i``), how many bytes each.

    Members are None where nothing was said.
    """

    __slots__ = ("count", "kind", "size")

    def __init__(
        self, count: int | None = None, kind: str | None = None, size: int | None = None
    ) -> None:
        self.count = count
        self.kind = kind
        self.size = size


class Spec:
    """One argument of a command."""

    __slots__ = ("dotted", "name", "optional", "type")

    def __init__(self, text: str) -> None:
        self.name, _, kind = text.partition(":")
        self.optional = kind.endswith(("?", ".")) or kind.startswith(("-", "/"))
        self.dotted = kind.endswith(".")
        self.type = kind.rstrip("?.")


def specs(text: str) -> list[Spec]:
    """Return the arguments that a description such as ``detach:-d,uri:s`` declares."""
    return [Spec(one) for one in text.split(",")] if text else []


def first_word(line: str) -> tuple[str, str]:
    """Return the command's name and the rest of the line. ``p/x 1`` is ``p`` and ``/x 1``."""
    line = line.lstrip(_SPACE)
    end = 0
    while end < len(line) and line[end] not in _SPACE + "/":
        end += 1
    if end == 0 and line:
        end = 1
    return line[:end], line[end:]


def parse_arguments(
    command: str,
    description: str,
    text: str,
    register: Callable[[str], int | None],
) -> dict[str, Any]:
    """Read ``text`` as the arguments of ``command``.

    :param description: see the module's docstring
    :param register: the value of a register, or None if there is none of that name
    :returns: by name; absent optional ones are None, switches are booleans
    :raises ParseError: with QEMU's text
    """
    found: dict[str, Any] = {}
    wanted = specs(description)
    rest = _take_switches(command, [one for one in wanted if one.type[0] == "-"], text, found)
    for one in wanted:
        rest = rest.lstrip(_SPACE)
        if one.type[0] == "-":
            continue
        if one.dotted:
            if not rest.startswith("."):
                found[one.name] = None
                continue
            rest = rest[1:]
        if one.type == "/":
            found[one.name], rest = _format(rest)
        elif one.optional and not one.dotted and not rest:
            found[one.name] = None
        elif one.type == "s":
            found[one.name], rest = _word(command, rest)
        elif one.type == "S":
            if not rest:
                raise ParseError(f"{command}: string expected")
            found[one.name], rest = rest.rstrip(_SPACE), ""
        elif one.type == "b":
            value, rest = _word(command, rest)
            if value not in ("on", "off"):
                raise ParseError(f"{command}: expected 'on' or 'off'")
            found[one.name] = value == "on"
        else:
            found[one.name], rest = evaluate(rest, register)
            if one.type == "i" and not -(1 << 31) <= found[one.name] < 1 << 32:
                raise ParseError(f"'{command}' has failed: integer is for 32-bit values")
    if rest.strip(_SPACE):
        raise ParseError(f"{command}: extraneous characters at the end of line")
    return found


def _take_switches(command: str, switches: list[Spec], text: str, found: dict[str, Any]) -> str:
    letters = {one.type[1]: one.name for one in switches}
    found.update((one.name, False) for one in switches)
    rest = text.lstrip(_SPACE)
    while letters and len(rest) >= 2 and rest[0] == "-" and rest[1].isalpha():
        word, _, after = rest.partition(" ")
        for letter in word.rstrip(_SPACE)[1:]:
            if letter not in letters:
                raise ParseError(f"{command}: unsupported option -{letter}")
            found[letters[letter]] = True
        rest = after.lstrip(_SPACE)
    return rest


def _word(command: str, text: str) -> tuple[str, str]:
    if not text:
        raise ParseError(f"{command}: string expected")
    if text[0] != '"':
        end = 0
        while end < len(text) and text[end] not in _SPACE:
            end += 1
        return text[:end], text[end:]
    out, at = [], 1
    while at < len(text) and text[at] != '"':
        if text[at] == "\\":
            at += 1
            if text[at : at + 1] not in _ESCAPES:
                raise ParseError(f"unsupported escape code: '\\{text[at : at + 1]}'")
            out.append(_ESCAPES[text[at]])
        else:
            out.append(text[at])
        at += 1
    if at >= len(text):
        raise ParseError("unterminated string")
    return "".join(out), text[at + 1 :]


def _format(text: str) -> tuple[Format, str]:
    found = Format()
    if not text.startswith("/"):
        return found, text
    at = 1
    while at < len(text) and text[at] in "0123456789":
        at += 1
    if at > 1:
        found.count = int(text[1 : min(at, 10)])
    while at < len(text) and text[at] not in _SPACE:
        letter = text[at]
        if letter in "odxuci":
            found.kind = letter
        elif letter in _SIZES:
            found.size = _SIZES[letter]
        else:
            raise ParseError(f"invalid char in format: '{letter}'")
        at += 1
    return found, text[at:]


def evaluate(text: str, register: Callable[[str], int | None]) -> tuple[int, str]:
    """Evaluate the expression that ``text`` begins with.

    Numbers are decimal, 0x... or 0...; ``'c'`` is a character, ``$name`` a register. Unary
    + - ~ bind closest, then & | ^, then * / %, then + and -, as in QEMU. All is modulo 2^64.

    :returns: the value, as a signed 64-bit number, and the rest of the text
    :raises ParseError: not an expression
    """
    parser = _Expression(text, register)
    value = parser.sum(0)
    return (value ^ 1 << 63) - (1 << 63), text[parser.at :]


class _Expression:
    def __init__(self, text: str, register: Callable[[str], int | None]) -> None:
        self.text = text
        self.at = 0
        self.register = register

    def peek(self) -> str:
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1
        return self.text[self.at : self.at + 1]

    def sum(self, depth: int) -> int:
        value = self.product(depth)
        while (operator := self.peek()) and operator in "+-":
            self.at += 1
            right = self.product(depth)
            value = (value + right if operator == "+" else value - right) & _MASK
        return value

    def product(self, depth: int) -> int:
        value = self.logic(depth)
        while (operator := self.peek()) and operator in "*/%":
            self.at += 1
            right = self.logic(depth)
            if operator == "*":
                value = value * right & _MASK
            elif right == 0:
                raise ParseError("division by zero")
            elif operator == "/":
                value //= right
            else:
                value %= right
        return value

    def logic(self, depth: int) -> int:
        value = self.unary(depth)
        while (operator := self.peek()) and operator in "&|^":
            self.at += 1
            right = self.unary(depth)
            if operator == "&":
                value &= right
            elif operator == "|":
                value |= right
            else:
                value ^= right
        return value

    def unary(self, depth: int) -> int:
        if depth > _MAX_NESTING:
            raise ParseError("expression is nested too deeply")
        start = self.peek()
        if not start:
            raise ParseError("unexpected end of expression")
        if start in "0123456789":
            return self.number()
        self.at += 1
        if start == "+":
            return self.unary(depth + 1)
        if start == "-":
            return -self.unary(depth + 1) & _MASK
        if start == "~":
            return ~self.unary(depth + 1) & _MASK
        if start == "(":
            value = self.sum(depth + 1)
            if self.peek() != ")":
                raise ParseError("')' expected")
            self.at += 1
            return value
        if start == "'":
            return self.character()
        if start == "$":
            return self.named()
        raise ParseError(f"invalid char '{start}' in expression")

    def number(self) -> int:
        text, start = self.text, self.at
        base, digits = 10, "0123456789"
        if text[start : start + 2] in ("0x", "0X"):
            base, digits, start = 16, "0123456789abcdefABCDEF", start + 2
        elif text[start] == "0":
            base, digits = 8, "01234567"
        end = start
        while end < len(text) and text[end] in digits:
            end += 1
        # Bounded before it is converted: int() of a long text takes quadratic time.
        if end == start or end - start > _MAX_DIGITS or text[end : end + 1].isalnum():
            raise ParseError("invalid number")
        value = int(text[start:end], base)
        if value > _MASK:
            raise ParseError("number too large")
        self.at = end
        return value

    def character(self) -> int:
        value = self.text[self.at : self.at + 1]
        if not value or value == "'":
            raise ParseError("character constant expected")
        if self.text[self.at + 1 : self.at + 2] != "'":
            raise ParseError("missing terminating ' character")
        self.at += 2
        return ord(value)

    def named(self) -> int:
        start = self.at
        while self.at < len(self.text) and (
            self.text[self.at].isalnum() or self.text[self.at] in "_."
        ):
            self.at += 1
        value = self.register(self.text[start : self.at])
        if value is None:
            raise ParseError("unknown register")
        return value & _MASK
