"""What a device's state is made of: descriptions that encode, decode and explain themselves.

A description is declared once, beside the device, as QEMU's VMStateDescription is: a name, a
version and a list of fields, each the name of an attribute. Values are big endian on the
wire. Decoding never touches the device: it fills a :class:`Record`, which the device takes
over after all of the stream has been read and found possible.

A guest waits for this in every update: whatever has a fixed size is packed and unpacked at
once, and looked at field by field only to describe it or to name the field that is cut off.
"""

from __future__ import annotations

import struct

from pyvmm.errors import VmStateError
from pyvmm.vmstate.cursor import Cursor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

SUBSECTION = 0x05


class Record:
    """Decoded state: one attribute per field."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    if TYPE_CHECKING:  # the attributes are as the description says

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"Record({inner})"


class Field:
    """One attribute. ``name`` is the attribute and the name in the stream's description."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def save(self, out: bytearray, state: Any) -> None:
        """Append the attribute's bytes."""
        raise NotImplementedError

    def load(self, source: Cursor, into: Record) -> None:
        """Set the attribute from the stream."""
        raise NotImplementedError

    def load_named(self, source: Cursor, into: Record) -> None:
        """:meth:`load`, whose errors name the field."""
        source.path.append(self.name)
        self.load(source, into)
        source.path.pop()

    def describe(self, state: Any) -> list[dict[str, Any]]:
        """Return the field's entries in the stream's JSON description; ``state`` was loaded."""
        raise NotImplementedError

    @property
    def is_fixed(self) -> bool:
        """Whether these entries are always the same."""
        return True

    @property
    def codes(self) -> str:
        """What ``struct`` calls the field's values; only a field of fixed size has that."""
        raise NotImplementedError


class Scalar(Field):
    """An integer of fixed width, or a bool. A :class:`_Run` saves and loads it.

    :param kind: QEMU's type name: ``uint8`` … ``uint64``, ``int32``, ``int64``, ``bool``
    """

    __slots__ = ("kind",)
    #: kind -> code for ``struct`` and size in bytes
    KINDS = {
        "uint8": ("B", 1),
        "uint16": ("H", 2),
        "uint32": ("I", 4),
        "uint64": ("Q", 8),
        "int32": ("i", 4),
        "int64": ("q", 8),
        "bool": ("?", 1),
    }

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name)
        self.kind = kind

    def describe(self, state: Any) -> list[dict[str, Any]]:
        return [{"name": self.name, "type": self.kind, "size": self.KINDS[self.kind][1]}]

    @property
    def codes(self) -> str:
        return self.KINDS[self.kind][0]


class _Run:
    """Scalars that follow each other, saved and loaded together."""

    __slots__ = ("_fields", "_names", "_pack")

    def __init__(self, fields: list[Field]) -> None:
        self._fields = fields
        self._names = [field.name for field in fields]
        self._pack = struct.Struct(">" + _codes(fields))

    def save(self, out: bytearray, state: Any) -> None:
        out += self._pack.pack(*[getattr(state, name) for name in self._names])

    def load_named(self, source: Cursor, into: Record) -> None:
        values = _unpack(source, self._pack, self._fields)
        into.__dict__.update(zip(self._names, values, strict=True))


class Array(Field):
    """A fixed number of equal integers; any sequence saves, a list is loaded."""

    __slots__ = ("count", "kind", "pack")

    def __init__(self, name: str, kind: str, count: int) -> None:
        super().__init__(name)
        self.kind = kind
        self.count = count
        self.pack = struct.Struct(">" + self.codes)

    def save(self, out: bytearray, state: Any) -> None:
        out += self.pack.pack(*getattr(state, self.name))

    def load(self, source: Cursor, into: Record) -> None:
        setattr(into, self.name, list(self.pack.unpack(source.take(self.pack.size))))

    def describe(self, state: Any) -> list[dict[str, Any]]:
        size = self.pack.size // self.count
        return [{"name": self.name, "array_len": self.count, "type": self.kind, "size": size}]

    @property
    def codes(self) -> str:
        return f"{self.count}{Scalar.KINDS[self.kind][0]}"


class Buffer(Field):
    """Bytes, passed on as they are.

    :param size: how many, or the name of an earlier integer field that tells
    :param maximum: the most that is accepted from a stream
    """

    __slots__ = ("maximum", "size")

    def __init__(self, name: str, size: int | str, maximum: int = 0) -> None:
        super().__init__(name)
        self.size = size
        self.maximum = maximum if isinstance(size, str) else size

    def save(self, out: bytearray, state: Any) -> None:
        data = bytes(getattr(state, self.name))
        if len(data) != _count(self.size, state):
            raise VmStateError(self.name, f"{len(data)} bytes, not {_count(self.size, state)}")
        out += data

    def load(self, source: Cursor, into: Record) -> None:
        setattr(into, self.name, source.take(_checked(self, source, into)))

    def describe(self, state: Any) -> list[dict[str, Any]]:
        return [{"name": self.name, "type": "buffer", "size": _count(self.size, state)}]

    @property
    def is_fixed(self) -> bool:
        return isinstance(self.size, int)


class Struct(Field):
    """An attribute that is itself a described record."""

    __slots__ = ("inner",)

    def __init__(self, name: str, inner: Description) -> None:
        super().__init__(name)
        self.inner = inner

    def save(self, out: bytearray, state: Any) -> None:
        self.inner.save(out, getattr(state, self.name))

    def load(self, source: Cursor, into: Record) -> None:
        setattr(into, self.name, self.inner.load(source, self.inner.version))

    def describe(self, state: Any) -> list[dict[str, Any]]:
        # What is of fixed size is described without looking at it.
        return [_describe_struct(self.name, self.inner, getattr(state, self.name, None))]

    @property
    def is_fixed(self) -> bool:
        return self.inner.is_fixed

    @property
    def codes(self) -> str:
        return _codes(self.inner.fields)


class CStruct(Struct):
    """An attribute that is a structure of C's: its members, in their order, are the fields.

    :param layout: how they lie in memory, for ``struct``: the codes of the fields, as the
        processor aligns them, and ``x`` for what is not carried
    :param make: gives a new structure, all zeros
    :param view: gives the memory of one, writable
    """

    __slots__ = ("layout", "make", "pack", "view")

    def __init__(
        self,
        name: str,
        inner: Description,
        layout: str,
        make: Callable[[], Any],
        view: Callable[[Any], Any],
    ) -> None:
        super().__init__(name, inner)
        self.layout = struct.Struct("@" + layout)
        self.pack = struct.Struct(">" + self.codes)
        self.make = make
        self.view = view

    def save(self, out: bytearray, state: Any) -> None:
        out += self.pack.pack(*self.layout.unpack(self.view(getattr(state, self.name))))

    def load(self, source: Cursor, into: Record) -> None:
        made = self.make()
        values = _unpack(source, self.pack, self.inner.fields)
        self.layout.pack_into(self.view(made), 0, *values)
        setattr(into, self.name, made)


class StructArray(Field):
    """A number of records of one description.

    :param size: how many, or the name of an earlier integer field that tells
    :param maximum: the most that is accepted from a stream
    """

    __slots__ = ("inner", "maximum", "size")

    def __init__(self, name: str, inner: Description, size: int | str, maximum: int = 0) -> None:
        super().__init__(name)
        self.inner = inner
        self.size = size
        self.maximum = maximum if isinstance(size, str) else size

    def save(self, out: bytearray, state: Any) -> None:
        items = getattr(state, self.name)
        for index in range(_count(self.size, state)):
            self.inner.save(out, items[index])

    def load(self, source: Cursor, into: Record) -> None:
        items = []
        for index in range(_checked(self, source, into)):
            source.path.append(f"{self.name}[{index}]")
            items.append(self.inner.load(source, self.inner.version))
            source.path.pop()
        setattr(into, self.name, items)

    def describe(self, state: Any) -> list[dict[str, Any]]:
        items = getattr(state, self.name)
        if items and self.inner.is_fixed:
            # One entry for all of them: hundreds of MSRs and CPUID leaves are described so.
            entry = _describe_struct(self.name, self.inner, items[0])
            return [entry | {"array_len": len(items)}]
        return [
            _describe_struct(self.name, self.inner, item) | {"index": index}
            for index, item in enumerate(items)
        ]

    @property
    def is_fixed(self) -> bool:
        return isinstance(self.size, int) and self.inner.is_fixed


class Table(StructArray):
    """A :class:`StructArray` as one tuple: the values of all records, one after the other.

    Hundreds of records would be hundreds of objects. The records are of fixed size.
    """

    __slots__ = ("row",)

    def __init__(self, name: str, inner: Description, size: int | str, maximum: int = 0) -> None:
        super().__init__(name, inner, size, maximum)
        self.row = _codes(inner.fields)

    def save(self, out: bytearray, state: Any) -> None:
        count = _count(self.size, state)
        out += struct.pack(">" + count * self.row, *getattr(state, self.name))

    def load(self, source: Cursor, into: Record) -> None:
        count = _checked(self, source, into)
        row = struct.calcsize(">" + self.row)
        if (whole := (len(source.data) - source.at) // row) < count:
            source.at += whole * row
            source.path.append(f"{self.name}[{whole}]")
            _skip(source, self.inner.fields)
        values = struct.unpack(">" + count * self.row, source.take(count * row))
        setattr(into, self.name, values)

    def describe(self, state: Any) -> list[dict[str, Any]]:
        count = _count(self.size, state)
        entry = _describe_struct(self.name, self.inner, None)
        return [entry | {"array_len": count}] if count else []


class Description:
    """The state of a device, or a part of it that may be left out (a subsection).

    :param name: QEMU's name where the state maps one to one
    :param version: written to the stream; a stream with a newer one is refused
    :param minimum_version: the oldest that is still accepted
    :param needed: for a subsection: whether this state has to be written
    :param check: raises ValueError, with what is impossible, for a loaded record
    """

    __slots__ = (
        *("_steps", "check", "fields", "minimum_version", "name", "needed", "subsections"),
        "version",
    )

    def __init__(
        self,
        name: str,
        fields: Sequence[Field],
        *,
        version: int = 1,
        minimum_version: int | None = None,
        subsections: Sequence[Description] = (),
        needed: Callable[[Any], bool] | None = None,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self.name = name
        self.fields = fields
        self.version = version
        self.minimum_version = version if minimum_version is None else minimum_version
        self.subsections = subsections
        self.needed = needed
        self.check = check
        self._steps = _steps(fields)

    def save(self, out: bytearray, state: Any) -> None:
        """Append all fields, then the subsections that are needed."""
        for step in self._steps:
            step.save(out, state)
        for part in self._needed_parts(state):
            name = part.name.encode()
            out += struct.pack(">BB", SUBSECTION, len(name)) + name
            out += struct.pack(">I", part.version)
            part.save(out, state)

    def load(self, source: Cursor, version: int) -> Record:
        """Return a record of the given version, read and checked.

        :raises VmStateError: with the path of the field that cannot be
        """
        if not self.minimum_version <= version <= self.version:
            raise source.error(
                f"version {version} of {self.name} is not supported "
                f"(this program knows {self.minimum_version} to {self.version})"
            )
        record = Record()
        self._load_fields(source, record)
        self._load_parts(source, record)
        return record

    def describe(self, state: Any) -> dict[str, Any]:
        """Return the JSON description that QEMU's stream carries (``vmsd_name``, fields, ...).

        :param state: a record that was loaded: what it holds is what the stream held
        """
        result: dict[str, Any] = {
            "vmsd_name": self.name,
            "version": self.version,
            "fields": [entry for field in self.fields for entry in field.describe(state)],
        }
        # An absent subsection has left its attributes out.
        parts = [
            part.describe(state)
            for part in self.subsections
            if all(hasattr(state, field.name) for field in part.fields)
        ]
        if parts:
            result["subsections"] = parts
        return result

    @property
    def is_fixed(self) -> bool:
        """Whether all records of it have the same description."""
        return not self.subsections and all(field.is_fixed for field in self.fields)

    def _needed_parts(self, state: Any) -> list[Description]:
        return [part for part in self.subsections if part.needed is None or part.needed(state)]

    def _load_fields(self, source: Cursor, record: Record) -> None:
        for step in self._steps:
            step.load_named(source, record)
        if self.check is not None:
            try:
                self.check(record)
            except ValueError as problem:
                raise source.error(str(problem)) from None

    def _load_parts(self, source: Cursor, record: Record) -> None:
        following = list(self.subsections)
        # A subsection's name begins with its owner's, which is how an inner record knows
        # that the subsection that follows belongs to an outer one.
        while (name := _peek_subsection(source)).startswith(self.name + "/"):
            source.at += 2 + len(name)
            # In the order of the declaration, which is the only one that a description tells.
            while following and following[0].name != name:
                del following[0]
            if not following:
                raise source.error(f"subsection {name!r} is unknown, repeated or out of order")
            known = following.pop(0)
            version = source.u32()
            if not known.minimum_version <= version <= known.version:
                raise source.error(f"version {version} of {name} is not supported")
            source.path.append(name)
            known._load_fields(source, record)
            known._load_parts(source, record)
            source.path.pop()


def _steps(fields: Sequence[Field]) -> list[Field | _Run]:
    # The fields with runs of scalars in one.
    steps: list[Field | _Run] = []
    run: list[Field] = []
    for field in fields:
        if isinstance(field, Scalar):
            run.append(field)
            continue
        if run:
            steps.append(_Run(run))
            run = []
        steps.append(field)
    if run:
        steps.append(_Run(run))
    return steps


def _codes(fields: Iterable[Field]) -> str:
    return "".join([field.codes for field in fields])


def _unpack(source: Cursor, pack: struct.Struct, fields: Iterable[Field]) -> tuple[Any, ...]:
    """Return the values of the next ``fields``, which are of fixed size.

    :param pack: all of them
    :raises VmStateError: with the path of the first that is not there as a whole
    """
    at = source.at
    if at + pack.size > len(source.data):
        _skip(source, fields)
    source.at = at + pack.size
    return pack.unpack_from(source.data, at)


def _skip(source: Cursor, fields: Iterable[Field]) -> None:
    # Field by field, to where the stream ends: the error names the one that it ends in.
    for field in fields:
        source.path.append(field.name)
        if isinstance(field, Struct):
            _skip(source, field.inner.fields)
        else:
            source.take(struct.calcsize(">" + field.codes))
        source.path.pop()


def _count(size: int | str, state: Any) -> int:
    return size if isinstance(size, int) else int(getattr(state, size))


def _checked(field: Buffer | StructArray, source: Cursor, into: Record) -> int:
    # A count from the stream decides how much is allocated, so it is capped first.
    count = _count(field.size, into)
    if not 0 <= count <= field.maximum:
        raise source.error(f"{count} elements, at most {field.maximum} are possible")
    return count


def _peek_subsection(source: Cursor) -> str:
    # After an inner record other fields may follow, so what looks like a subsection need not
    # be one, nor have a name that ends before the stream does.
    if source.data[source.at : source.at + 1] != b"\x05":
        return ""
    start = source.at + 2
    end = start + int.from_bytes(source.data[start - 1 : start], "big")
    name = source.data[start:end] if end <= len(source.data) else b""
    return name.decode("ascii") if name.isascii() else ""


def _describe_struct(name: str, inner: Description, state: Any) -> dict[str, Any]:
    described = inner.describe(state)
    return {"name": name, "type": "struct", "struct": described, "size": _size(described)}


def _size(described: dict[str, Any]) -> int:
    # Of the bytes that a description stands for.
    size: int = sum(entry["size"] * entry.get("array_len", 1) for entry in described["fields"])
    for part in described.get("subsections", ()):
        size += 2 + len(part["vmsd_name"]) + 4 + _size(part)
    return size


def u8(name: str) -> Scalar:
    """Return an unsigned 8-bit field."""
    return Scalar(name, "uint8")


def u16(name: str) -> Scalar:
    """Return an unsigned 16-bit field."""
    return Scalar(name, "uint16")


def u32(name: str) -> Scalar:
    """Return an unsigned 32-bit field."""
    return Scalar(name, "uint32")


def u64(name: str) -> Scalar:
    """Return an unsigned 64-bit field."""
    return Scalar(name, "uint64")


def i32(name: str) -> Scalar:
    """Return a signed 32-bit field."""
    return Scalar(name, "int32")


def i64(name: str) -> Scalar:
    """Return a signed 64-bit field."""
    return Scalar(name, "int64")


def boolean(name: str) -> Scalar:
    """Return a field of one byte that is 0 or 1."""
    return Scalar(name, "bool")


def each(make: Callable[[str], Scalar], names: str) -> list[Scalar]:
    """Return one field per word of ``names``."""
    return [make(name) for name in names.split()]
