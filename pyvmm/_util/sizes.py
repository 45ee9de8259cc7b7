"""Byte sizes as people type them: ``4G``, ``256M``, ``0x10000``, ``1048576``.

Suffixes are the powers of 1024 that QEMU takes (B, K, M, G, T, P, E, either case). Fractions are
left out: every size that a machine needs is a whole number of some unit.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

_SUFFIXES = "BKMGTPE"
_LARGEST = (1 << 63) - 1  # off_t and mmap lengths are signed
_MEND = "write a whole number and one of K, M, G or T, such as 4G"


def parse_size(
    text: str,
    option: str,
    *,
    default_unit: str = "B",
    minimum: int = 1,
    maximum: int = _LARGEST,
    multiple: int = 1,
) -> int:
    """Return *text* in bytes.

    :param option: what the operator typed the size for, e.g. ``-m``; it opens every error
    :param default_unit: suffix that a number without one has (``-m`` counts in ``M``)
    :param multiple: the size must be a multiple of so many bytes
    :raises ConfigError: not a size, or outside *minimum* to *maximum* bytes
    """
    shown = text if len(text) <= 40 else text[:37] + "..."
    unit = default_unit
    if text[:2].lower() == "0x":  # a hexadecimal size has no suffix: B and E are digits
        digits, base, unit = text[2:].lower(), 16, "B"
    else:
        if text and text[-1].upper() in _SUFFIXES:
            text, unit = text[:-1], text[-1].upper()
        digits, base = text, 10
    if not digits or digits.strip("0123456789abcdef"[:base]):
        raise ConfigError(f"{option}: {shown!r} is not a size; {_MEND}")
    # Bound the digits before converting: int() takes quadratic time and refuses thousands.
    significant = digits.lstrip("0")
    size = maximum + 1
    if len(significant) <= 19:
        size = int(significant or "0", base) << 10 * _SUFFIXES.index(unit)
    if size < minimum:
        raise ConfigError(f"{option}: {shown!r} is too small; give at least {format_size(minimum)}")
    if size > maximum:
        raise ConfigError(f"{option}: {shown!r} is too large; give at most {format_size(maximum)}")
    if size % multiple:
        up = format_size(size + -size % multiple)
        raise ConfigError(
            f"{option}: {shown!r} is not a multiple of {format_size(multiple)}; give {up}"
        )
    return size


def format_size(size: int) -> str:
    """Return *size* bytes in the shortest exact form that :func:`parse_size` reads back."""
    power = 0
    while size and size % 1024 == 0 and power < len(_SUFFIXES) - 1:
        size, power = size // 1024, power + 1
    return f"{size}{_SUFFIXES[power]}"
