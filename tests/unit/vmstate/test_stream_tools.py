"""The whole file as other tools for such streams read it, with nothing of pyvmm's reader."""

import json
import struct

import pytest

from pyvmm.testing import streams
from pyvmm.vmstate import stream
from pyvmm.vmstate.fields import Buffer, Description, Record, Struct, StructArray, u8, u16, u32
from pyvmm.vmstate.section import Section

INTEGERS = {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}


class ToolError(Exception):
    pass


class Tool:
    """Finds the JSON from the end and walks the file by it, from the first byte to the last."""

    def __init__(self, data):
        self.data, self.at = data, 0
        tail = data[-(10 << 20) :]
        text_at = tail.index(b"{", tail.rindex(b"\0"))
        self.text_at = len(data) - len(tail) + text_at
        if data[self.text_at - 5] != 6:
            raise ToolError("no description before the brace")
        (size,) = struct.unpack(">I", data[self.text_at - 4 : self.text_at])
        self.json = json.loads(data[self.text_at : self.text_at + size])
        if self.text_at + size != len(data):
            raise ToolError("the description does not end the file")
        self.devices = {(d["name"], d["instance_id"]): d for d in self.json["devices"]}
        assert isinstance(self.json["page_size"], int)

    def take(self, size):
        chunk = self.data[self.at : self.at + size]
        if len(chunk) != size:
            raise ToolError("short read")
        self.at += size
        return chunk

    def number(self, size):
        return int.from_bytes(self.take(size), "big")

    def string(self):
        size = int.from_bytes(self.take(1), "big", signed=True)
        if size < 0:
            raise ToolError("a name longer than 127 bytes")
        return self.take(size).decode()

    def expect(self, what, size, problem):
        if (found := self.number(size)) != what:
            raise ToolError(f"{problem}: {found:#x}")

    def walk(self):
        """The file's devices, values by name."""
        self.expect(0x5145564D, 4, "magic")
        self.expect(3, 4, "version")
        found, ram_ended = {}, False
        names = {}
        while (kind := self.number(1)) != 0:
            if kind == 7:
                found["configuration"] = self.section(self.json["configuration"])
            elif kind == 8:
                self.expect(0x0B, 2, "command")
                self.expect(0, 2, "size of the command")
            elif kind in (1, 4):
                section_id, name = self.number(4), self.string()
                instance, version = self.number(4), self.number(4)
                names[section_id] = name
                if name == "ram":
                    assert version == 4
                    found["ram"] = self.ram()
                else:
                    device = self.devices[(name, instance)]
                    assert device["version"] == version
                    found[(name, instance)] = self.section(device)
            elif kind in (2, 3):
                section_id = self.number(4)
                assert names[section_id] == "ram"
                self.expect(0x10, 8, "end of the RAM section")
                ram_ended = True
            else:
                raise ToolError(f"section type {kind:#x}")
            if kind not in (7, 8):
                self.expect(0x7E, 1, "footer")
                self.expect(section_id, 4, "footer's section")
        assert ram_ended
        self.expect(6, 1, "description")
        self.take(4)
        if self.at != self.text_at:
            raise ToolError("the walk does not end at the description")
        assert set(self.devices) == {key for key in found if isinstance(key, tuple)}
        return found

    def ram(self):
        total = self.number(8)
        assert total & 0x04
        total &= ~(self.json["page_size"] - 1)
        blocks = {}
        while total:
            name = self.string()
            blocks[name] = self.number(8)
            total -= blocks[name]
        self.expect(0x10, 8, "end of the block list")
        return blocks

    def section(self, described):
        values = {}
        for field in self.unfold(described["fields"]):
            value = self.field(field)
            if "index" in field:
                items = values.setdefault(field["name"], [])
                assert field["index"] == len(items)
                items.append(value)
            else:
                values[field["name"]] = value
        for part in described.get("subsections", []):
            self.expect(5, 1, "subsection")
            assert self.string() == part["vmsd_name"]
            assert self.number(4) == part["version"]
            values[part["vmsd_name"]] = self.section(part)
        return values

    @staticmethod
    def unfold(fields):
        for field in fields:
            if "array_len" not in field:
                yield field
                continue
            for index in range(field["array_len"]):
                yield field | {"index": index}

    def field(self, field):
        start = self.at
        if field["type"] == "struct":
            value = self.section(field["struct"])
        else:
            raw = self.take(field["size"])
            value = raw
            if field["type"] in INTEGERS:
                assert INTEGERS[field["type"]] == field["size"]
                value = int.from_bytes(raw, "big", signed=field["type"][0] == "i")
        assert self.at - start == field["size"]
        return value


def same(value, read):
    """Whether a record is what the tool has read."""
    if isinstance(value, Record):
        names = [name for name in read if "/" not in name]
        inner = {n: v for name in read if "/" in name for n, v in read[name].items()}
        flat = {name: read[name] for name in names} | inner
        # Empty arrays are not described.
        rest = {name for name in value.__dict__ if name not in flat}
        assert not any(len(getattr(value, name)) for name in rest)
        return all(same(getattr(value, name), flat[name]) for name in flat if "/" not in name)
    if isinstance(read, dict):  # of a C structure
        return all(same(getattr(value, name), part) for name, part in read.items())
    if isinstance(value, tuple):  # the values of all records of a table
        return list(value) == [part for record in read for part in record.values()]
    if isinstance(read, list):
        return len(value) == len(read) and all(map(same, value, read))
    return value == read


@pytest.mark.parametrize(
    "arguments",
    [(), ("-smp", "3"), ("-serial", "null"), ("-object", "memory-backend-memfd,id=r,size=1M")],
)
def test_whole_file_is_read_by_its_description(arguments):
    config = streams.machine_config(*arguments)
    data = streams.make(config, described=True, seed=0xABCD)
    found = Tool(data).walk()
    own = streams.descriptions(config)
    assert found.pop("configuration") == {"len": 5, "name": b"pyvmm"}
    assert "pc.bios" in found.pop("ram")
    loaded = stream.read(data, own)
    assert found.keys() == loaded.records.keys()
    for key, record in loaded.records.items():
        assert same(record, found[key]), key


INNER = Description("inner", [u8("a"), u16("b")])
OPEN = Description("open", [u8("size"), Buffer("data", "size", 9)])
WHOLE = Description(
    "whole",
    [
        u32("count"),
        StructArray("equal", INNER, "count", 9),
        StructArray("unequal", OPEN, "count", 9),
        Struct("one", OPEN),
    ],
    subsections=[
        Description("whole/one", [u8("x")], needed=lambda s: s.x, subsections=[
            Description("whole/one/deep", [u8("y")], needed=lambda s: s.y),
        ]),
        Description("whole/two", [Struct("inner", INNER)], needed=lambda s: s.inner.a),
    ],
)  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("x", [0, 1])
@pytest.mark.parametrize("y", [0, 2])
@pytest.mark.parametrize("a", [0, 3])
def test_every_shape_of_state(count, x, y, a):
    state = Record(
        count=count,
        equal=[Record(a=n, b=n << 8) for n in range(count)],
        unequal=[Record(size=n, data=b"d" * n) for n in range(count)],
        one=Record(size=2, data=b"\x7e\0"),
        x=x,
        y=y,
        inner=Record(a=a, b=5),
    )
    writer = stream.Writer("pyvmm", [])
    writer.add(Section("whole", 7, WHOLE, lambda: state, lambda _: None))
    data = writer.finish()
    data += streams.describe(data, {("whole", 7): WHOLE})
    found = Tool(data).walk()[("whole", 7)]
    assert found.get("equal", []) == [{"a": n, "b": n << 8} for n in range(count)]
    assert [item["size"] for item in found.get("unequal", [])] == list(range(count))
    assert ("whole/one" in found, "whole/two" in found) == (bool(x), bool(a))
    assert ("whole/one/deep" in found.get("whole/one", {})) == bool(x and y)


def test_length_of_the_description_never_looks_like_its_beginning():
    lengths = set()
    for size in range(1, 600):
        description = Description("d" * size, [u8("x")])
        writer = stream.Writer("pyvmm", [])
        record = Record(x=1)
        writer.add(Section("d", 0, description, lambda: record, lambda _: None))  # noqa: B023
        data = writer.finish()
        data += streams.describe(data, {("d", 0): description})
        tool = Tool(data)
        tool.walk()
        length = data[tool.text_at - 4 : tool.text_at]
        assert b"{" not in length
        assert b"\0" not in data[tool.text_at :]
        lengths.add(length)
    # 0x17a and 0x17c were met, so 0x17b was avoided.
    assert b"\0\0\x01\x7c" in lengths
    assert len(lengths) < 599


def test_many_equal_records_are_described_once():
    config = streams.machine_config()
    own = streams.descriptions(config)
    data = streams.make(config)
    (vcpu,) = [d for d in json.loads(streams.describe(data, own)[5:])["devices"]
               if d["name"] == "kvm-vcpu"]  # fmt: skip
    (msrs,) = [field for field in vcpu["fields"] if field["name"] == "msrs"]
    assert msrs["array_len"] == streams.COUNTS["nmsrs"]
    assert msrs["size"] == 12
