"""QEMU's option syntax: ``first,key=value,key=value``.

A comma inside a value is written twice. A word without ``=`` is the value of the implied
key when it comes first, and otherwise the old spelling of a boolean: ``server`` for
``server=on``, ``nowait`` for ``wait=off``. A repeated key is refused: the one that would
win is too easily not the one that was meant.
"""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

LARGEST_ID = 100


def parse_keyval(
    text: str, option: str, *, implied_key: str = "", flags: Collection[str] = ()
) -> dict[str, str]:
    """Return the keys and values of *text*, in the order in which they were written.

    :param option: what the operator typed the text for, e.g. ``-chardev``; it opens every
        error
    :param implied_key: the key of a first word that has no ``=``; empty if there is none
    :param flags: keys that may be written as a bare word, with ``no`` before it for off
    :raises ConfigError: an empty key, a repeated key, a bare word that is no flag, or a
        character that neither a path nor a command line can contain
    """
    check_text(text, option)
    values: dict[str, str] = {}
    for number, item in enumerate(_split(text)):
        key, equals, value = item.partition("=")
        if not equals:
            if number == 0 and implied_key:
                key, value = implied_key, item
            elif item in flags:
                value = "on"
            elif item.startswith("no") and item[2:] in flags:
                key, value = item[2:], "off"
            else:
                raise ConfigError(
                    f"{option}: {shorten(item)} has no value; write it as KEY=VALUE"
                    " (and a comma inside a value twice)"
                )
        if not key:
            raise ConfigError(f"{option}: {shorten(item)} has no key; write it as KEY=VALUE")
        if key in values:
            raise ConfigError(f"{option}: {shorten(key)} is given twice; leave one of them out")
        values[key] = value
    return values


def check_text(text: str, option: str) -> None:
    """Refuse a text that the kernel takes for neither a path nor a name.

    :raises ConfigError: if *text* has a NUL or cannot be encoded
    """
    try:
        if b"\0" not in os.fsencode(text):
            return
    except UnicodeEncodeError:
        pass
    raise ConfigError(f"{option}: {shorten(text)} has a character that no path or name can have")


class KeyedOption:
    """The keys of one option, as typed.

    :ivar option: how errors name it
    :ivar options: key to value
    """

    __slots__ = ("option", "options")

    option: str
    options: dict[str, str]

    def text(self, key: str) -> str:
        """Return a value as typed; empty if it is not given."""
        return self.options.get(key, "")

    def flag(self, key: str, default: bool = False) -> bool:
        """Return whether a value is on; *default* if it is not given.

        :raises ConfigError: it is neither on nor off
        """
        value = self.options.get(key)
        return default if value is None else parse_bool(value, self.option, key)


def check_keys(values: Iterable[str], known: Collection[str], option: str) -> None:
    """Refuse keys that are not among *known*, listing those.

    :raises ConfigError: naming the first unknown key, and the one that may have been meant
    """
    for key in values:
        if key not in known:
            listed = ", ".join(known) or "none"
            mend = did_you_mean(key, known)
            mend = f"{mend} The" if mend else "the"
            raise ConfigError(
                f"{option}: {shorten(key)} is not known here; {mend} keys are {listed}"
            )


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return a question, for an error, about the one of *known* that is most like *word*; empty
    if none is."""
    from difflib import get_close_matches

    close = get_close_matches(word[:60], known, 1)
    return f"did you mean {close[0]}?" if close else ""


def check_id(id: str, option: str) -> None:
    """Refuse what is no name. A name is a letter, then letters, digits, and any of ``-._``.

    :raises ConfigError: with the mend
    """
    plain = id.translate(str.maketrans("", "", "-._"))
    if not (id.isascii() and id[:1].isalpha() and plain.isalnum() and len(id) <= LARGEST_ID):
        raise ConfigError(
            f"{option}: id={shorten(id)} is no name; give a letter and then letters, digits,"
            " '-', '.' or '_'"
        )


def parse_bool(value: str, option: str, key: str) -> bool:
    """Return whether *value* says on (``on``, ``yes``, ``true`` and their opposites).

    :raises ConfigError: if it says neither
    """
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise ConfigError(f"{option}: {key}={shorten(value)} is neither on nor off; write {key}=on")


def parse_int(value: str, option: str, key: str, minimum: int, maximum: int) -> int:
    """Return the decimal or 0x-hexadecimal number that *value* is.

    :raises ConfigError: not a number, or outside *minimum* to *maximum*
    """
    base = 16 if value[:2].lower() == "0x" else 10
    digits = value[2:].lower() if base == 16 else value
    # Bounded before converting: int() takes quadratic time, and signs, blanks, underscores
    # and foreign digits, too.
    if digits and len(digits) <= 40 and not digits.strip("0123456789abcdef"[:base]):
        number = int(digits, base)
        if minimum <= number <= maximum:
            return number
    raise ConfigError(
        f"{option}: {key}={shorten(value)} is not possible; give a number from {minimum}"
        f" to {maximum}"
    )


def shorten(text: str) -> str:
    """Return *text* quoted for an error message, cut if it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _split(text: str) -> list[str]:
    # A doubled comma is one of the value; halves of it never stand at the end of an item,
    # because items are cut at the single commas only.
    items: list[str] = []
    item = ""
    at = 0
    while True:
        comma = text.find(",", at)
        if comma < 0:
            item += text[at:]
            break
        item += text[at:comma]
        if text[comma + 1 : comma + 2] == ",":
            item += ","
            at = comma + 2
        else:
            items.append(item)
            item = ""
            at = comma + 1
    # A comma at the very end is forgiven, as QEMU does.
    if item or not items:
        items.append(item)
    return items
