"""The loader against streams that are cut, bent, shuffled, or made by somebody else."""

import json
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._native import ffi
from pyvmm.errors import VmStateError
from pyvmm.migration import savevm
from pyvmm.testing import streams
from pyvmm.vmstate import stream
from pyvmm.vmstate.fields import Description, Record, u8, u32
from pyvmm.vmstate.section import Section

CONFIG = streams.machine_config("-m", "16M")
OWN = streams.descriptions(CONFIG)
DATA = streams.make(CONFIG, seed=0x1234)
# Two small devices, for what does not depend on what is in them.
FIRST = Description("first", [u32("x")], version=3, minimum_version=2)
SECOND = Description("second", [u8("y")])
SMALL = {("first", 0): FIRST, ("first", 1): FIRST, ("second", 0): SECOND}
BLOCKS = [("pc.ram", 1 << 20), ("pc.bios", 1 << 16)]


def read(data, own=OWN, machine="pyvmm"):
    return stream.read(data, own, machine)


def plain(value):
    """Loaded state as values that compare."""
    if isinstance(value, stream.Loaded):
        return value.machine, value.blocks, {k: plain(v) for k, v in value.records.items()}
    if isinstance(value, Record):
        return {name: plain(part) for name, part in value.__dict__.items()}
    if isinstance(value, ffi.CData):
        return bytes(ffi.buffer(value))
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def within(loaded, made):
    """Whether all that was loaded is as it was made."""
    if isinstance(loaded, Record):
        return all(within(value, getattr(made, name)) for name, value in loaded.__dict__.items())
    if isinstance(loaded, (list, tuple)):
        return len(loaded) == len(made) and all(map(within, loaded, made))
    return plain(loaded) == plain(made)


def section(name, instance, description, values=None):
    state = values or streams.record(description)
    return Section(name, instance, description, lambda: state, lambda _: None)


def split():
    """A small stream in pieces: header with RAM, each section, the end mark."""
    writer = stream.Writer("pyvmm", BLOCKS)
    pieces, before = [], len(writer.finish()) - 1
    pieces.append(stream.Writer("pyvmm", BLOCKS).finish()[:-1])
    writer = stream.Writer("pyvmm", BLOCKS)
    for (name, instance), description in SMALL.items():
        writer.add(section(name, instance, description))
        whole = bytes(writer._out)
        pieces.append(whole[before:])
        before = len(whole)
    return [*pieces, b"\0"]


HEADER, *SECTIONS, END = split()


def test_what_was_written_is_read():
    assert read(DATA).machine == "pyvmm"
    assert read(DATA).blocks == [("pc.ram", 16 << 20), ("pc.bios", 64 << 10)]
    assert list(read(DATA).records) == list(OWN)
    for key, record in read(DATA).records.items():
        made = streams.record(OWN[key], 0x1234)
        # Subsections that are not needed are left out.
        assert within(record, made)
    assert not read(DATA).is_described


def test_layout():
    assert (
        b"QEVM\0\0\0\3"
        b"\7\0\0\0\5pyvmm"
        b"\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4"
        + struct.pack(">Q", (1 << 20) + (1 << 16) | 4)
        + b"\6pc.ram"
        + struct.pack(">Q", 1 << 20)
        + b"\7pc.bios"
        + struct.pack(">Q", 1 << 16)
        + b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\1"
        b"\x08\0\x0b\0\0"
        b"\3\0\0\0\1\0\0\0\0\0\0\0\x10\x7e\0\0\0\1"
    ) == HEADER
    assert SECTIONS[1] == b"\4\0\0\0\3\5first\0\0\0\1\0\0\0\3\0\0\0\0\x7e\0\0\0\3"
    assert END == b"\0"


def test_truncation_is_refused_at_every_byte():
    for end in range(len(DATA)):
        with pytest.raises(VmStateError):
            read(DATA[:end])


def test_flipped_bit_is_refused_or_is_data():
    expected, slowest = plain(read(DATA)), 0.0
    accepted = 0
    for at in range(len(DATA)):
        changed = bytearray(DATA)
        changed[at] ^= 1 << (at % 8)
        begin = time.thread_time()
        try:
            loaded = read(bytes(changed))
        except VmStateError:
            continue
        finally:
            slowest = max(slowest, time.thread_time() - begin)
        accepted += 1
        assert plain(loaded) != expected
    assert slowest < 1.0
    assert 0 < accepted < len(DATA)


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data):
    for source in (data, HEADER + data, HEADER[:18] + data):
        try:
            read(source, SMALL)
        except VmStateError:
            continue


@given(st.data())
def test_several_changed_bytes_are_read_or_refused(data):
    changed = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(DATA) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(changed))
    except VmStateError:
        pass


@given(st.permutations(range(len(SECTIONS))))
def test_order_of_sections_does_not_matter(order):
    loaded = read(HEADER + b"".join(SECTIONS[n] for n in order) + END, SMALL)
    assert plain(loaded)[2] == plain(read(HEADER + b"".join(SECTIONS) + END, SMALL))[2]


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_repeated_section_is_refused(number):
    with pytest.raises(VmStateError, match="the section is there twice"):
        read(HEADER + b"".join(SECTIONS) + SECTIONS[number] + END, SMALL)


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_missing_section_is_refused_before_any_is_applied(number):
    pieces = SECTIONS[:number] + SECTIONS[number + 1 :]
    loaded = read(HEADER + b"".join(pieces) + END, SMALL)
    applied = []
    sections = [Section(*key, SMALL[key], lambda: None, applied.append) for key in SMALL]
    name, instance = list(SMALL)[number]
    with pytest.raises(VmStateError, match=rf"no section {name}\[{instance}\]"):
        stream.apply(loaded, sections)
    assert applied == []


def test_section_that_is_not_needed_is_neither_written_nor_missed():
    (key, description), *_ = SMALL.items()
    state, applied = streams.record(description), []
    for needed in (True, False):
        section = Section(
            *key, description, lambda: state, applied.append, needed=lambda needed=needed: needed
        )
        writer = stream.Writer("pyvmm", BLOCKS)
        writer.add(section)
        loaded = stream.read(writer.finish(), SMALL)
        assert list(loaded.records) == [key] * needed
        stream.apply(loaded, [section])
        assert len(applied) == 1


def test_sections_are_applied_in_the_machines_order():
    loaded = read(HEADER + b"".join(SECTIONS) + END, SMALL)
    applied = []
    keys = list(SMALL)[::-1]
    stream.apply(loaded, [Section(*key, SMALL[key], lambda: None, applied.append) for key in keys])
    assert applied == [loaded.records[key] for key in keys]


PLACES = {("bus@0/first", 0): FIRST, ("bus@8/first", 0): FIRST, ("second", 0): SECOND}
FORMER = {("first", 0): ("bus@0/first", 0), ("first", 1): ("bus@8/first", 0)}


def test_sections_by_their_former_names_are_read():
    data = HEADER + b"".join(SECTIONS) + END
    loaded = stream.read(data, PLACES, "pyvmm", FORMER)
    assert list(loaded.records) == list(PLACES)
    # The description explains the bytes of that stream.
    text = stream.describe(loaded, PLACES)
    shown = json.loads(text[text.index(b"{") :])
    assert [(one["name"], one["instance_id"]) for one in shown["devices"]] == list(SMALL)


@pytest.mark.parametrize("former", [False, True])
def test_sections_are_written_by_either_name(former):
    writer = stream.Writer("pyvmm", BLOCKS, former=former)
    for (key, description), old in zip(PLACES.items(), SMALL, strict=True):
        state = streams.record(description)
        writer.add(Section(*key, description, lambda s=state: s, lambda _: None, old))
    loaded = stream.read(writer.finish(), SMALL if former else PLACES)
    assert list(loaded.records) == list(SMALL if former else PLACES)


def test_section_under_both_names_is_refused():
    writer = stream.Writer("pyvmm", BLOCKS)
    for key in (("first", 0), ("bus@0/first", 0)):
        writer.add(section(*key, FIRST))
    with pytest.raises(VmStateError, match=r"^bus@0/first\[0\]: the section is there twice$"):
        stream.read(writer.finish(), PLACES, "pyvmm", FORMER)


def test_unknown_section_is_refused():
    with pytest.raises(VmStateError, match=r"^second\[0\]: this machine has no such device$"):
        read(HEADER + b"".join(SECTIONS) + END, dict.fromkeys(list(SMALL)[:2], FIRST))


def with_payload(name=b"first", instance=0, version=3, payload=bytes(4), footer=7, kind=4):
    return (
        struct.pack(">BIB", kind, 7, len(name))
        + name
        + struct.pack(">II", instance, version)
        + payload
        + struct.pack(">BI", 0x7E, footer)
    )


RAM = HEADER[HEADER.index(b"\1\0\0\0\1\3ram") :]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "truncated"),
        (b"Q", "truncated"),
        (b"QCPR" + HEADER[4:], "bad magic"),
        (b"\x7fELF" + HEADER[4:], "bad magic"),
        (HEADER[:7] + b"\2" + HEADER[8:], "unsupported migration stream version 2"),
        (HEADER[:7] + b"\4" + HEADER[8:], "unsupported migration stream version 4"),
        (HEADER[:8] + RAM + END, "the configuration section is missing"),
        (HEADER[:9] + b"\xff" * 4 + HEADER[13:], "a machine name of 4294967295 bytes"),
        (HEADER[:9] + b"\0\0\0\4pyvm" + RAM, "received is 'pyvm' and local is 'pyvmm'"),
        (HEADER[:9] + b"\0\0\0\6pyvmm\xe9" + RAM, "machine name is not ASCII"),
        (HEADER[:18] + END, "the stream has no RAM section"),
        (HEADER, "truncated"),
        (HEADER + b"\x7f", "no section begins with 0x7f"),
        (HEADER + RAM + END, "ram: the RAM section is there twice"),
        (HEADER + HEADER[-18:] + END, "section 1 ends, but is not open"),
        (HEADER[:18] + HEADER[-18:] + END, "section 1 ends, but is not open"),
        (HEADER + b"\2" + bytes(8), "no section begins with 0x2"),
        (HEADER + b"\x08\0\x05\0\0", "command 0x5 is not supported"),
        (HEADER + b"\x08\0\x0b\xff\xff" + END, "command 0xb is not supported"),
        (HEADER + with_payload(footer=8) + END, "section 7 does not end where it should"),
        (HEADER + with_payload(payload=bytes(3)) + END, "section 7 does not end where it should"),
        (HEADER + with_payload(payload=bytes(5)) + END, "section 7 does not end where it should"),
        (HEADER + with_payload(version=1) + END, "version 1 of first is not supported"),
        (HEADER + with_payload(version=4) + END, "version 4 of first is not supported"),
        (HEADER + with_payload(instance=2) + END, r"first\[2\]: this machine has no such device"),
        (HEADER + with_payload(name=b"") + END, r"\[0\]: this machine has no such device"),
        (HEADER + with_payload(name=b"f\xefrst") + END, "name is not ASCII"),
        (HEADER + with_payload(name=b"x" * 255) + END, "this machine has no such device"),
        (HEADER + with_payload(kind=1) + END, r"section first\[0\] version 3 is not supported"),
    ],
)
def test_malformed_stream_is_refused(data, problem):
    with pytest.raises(VmStateError, match=problem):
        read(data, SMALL)


@pytest.mark.parametrize("version", [2, 3])
def test_older_version_that_is_still_known_is_accepted(version):
    loaded = read(HEADER + with_payload(version=version, payload=b"\0\0\0\5") + END, SMALL)
    assert loaded.records[("first", 0)].x == 5


def ram(total, *blocks, end=b"\0\0\0\0\0\0\0\x10"):
    listed = b"".join(bytes((len(n),)) + n + struct.pack(">Q", size) for n, size in blocks)
    start = HEADER[:18] + HEADER[18:].split(struct.pack(">Q", (1 << 20) + (1 << 16) | 4))[0]
    return start + struct.pack(">Q", total) + listed + end + HEADER[-28:] + END


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (ram(0x1000, (b"a", 0x1000)), "the list of RAM blocks is missing"),
        (ram(0x1024, (b"a", 0x1000)), "the list of RAM blocks is missing"),
        (ram(0x1004, (b"a", 0x2000)), "block a of 8192 bytes does not fit the total"),
        (ram(0x2004, (b"a", 0x1800), (b"b", 0x800)), "does not fit the total"),
        (ram(0x1004, (b"a", 0), (b"a", 0)), "block a of 0 bytes"),
        (ram((1 << 64) - 4096 | 4, (b"a", (1 << 64) - 1)), "does not fit the total"),
        (ram(0x1004, (b"\xff", 0x1000)), "name is not ASCII"),
        (ram(0x1000 * 300 | 4, *((b"a", 0x1000),) * 300), "does not fit the total"),
        (ram(0x1004, (b"a", 0x1000), end=struct.pack(">Q", 0x1008)), "RAM pages"),
        (ram(0x1004, (b"a", 0x1000), end=struct.pack(">Q", 0x1002)), "RAM pages"),
    ],
)
def test_malformed_ram_section_is_refused(data, problem):
    with pytest.raises(VmStateError, match=problem):
        read(data, SMALL)


def test_ram_helper_makes_a_good_section_too():
    assert read(ram(0x3004, (b"a", 0x1000), (b"b", 0x2000)), SMALL).blocks == [
        ("a", 0x1000),
        ("b", 0x2000),
    ]


@pytest.mark.parametrize(
    "tail",
    [
        b"\0",
        b"\0" * 1000,
        b"\6\0\0\0\2{}",
        b"\6\xff\xff\xff\xff{",
        b"\6\0\0\0\7garbage",
        b"\6\0\0\0\0",
        b"\6" + struct.pack(">I", 8 << 20) + b"[" * (8 << 20),
        b"QEVM\0\0\0\3",
    ],
    ids=repr,
)
def test_what_follows_the_end_is_ignored(tail):
    loaded = read(DATA + tail[:])
    assert plain(loaded) == plain(read(DATA))
    assert loaded.is_described


def fake_machine():
    """What savevm wants of a machine."""
    machine = type("Machine", (), {})()
    sections = [section(*key, found) for key, found in OWN.items() if key[0] != "globalstate"]
    machine.sections_to_load = machine.sections_to_save = lambda: sections
    machine.device_sections = machine.sections_to_load
    machine.ram_blocks = [
        type("Backend", (), {"name": name, "size": size})() for name, size in read(DATA).blocks
    ]
    return machine


def test_machine_saves_and_describes_itself():
    machine = fake_machine()
    data = savevm.save(machine, "paused")
    loaded = savevm.read(machine, data)
    description = savevm.describe(machine, loaded)
    assert json.loads(description[5:])["devices"][-1]["name"] == "globalstate"
    assert savevm.describe(machine, savevm.read(machine, data + description)) == b""
    assert savevm.apply(machine, loaded, with_cpus=False) == "paused"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda machine: machine.ram_blocks.pop(), "2 blocks, the machine has 1"),
        (lambda machine: machine.ram_blocks.append(machine.ram_blocks[0]), "the machine has 3"),
        (lambda machine: machine.ram_blocks.reverse(), "Unknown ramblock 'pc.ram'"),
        (lambda machine: setattr(machine.ram_blocks[1], "size", 1 << 20), "mismatch: pc.bios"),
    ],
)
def test_other_ram_is_refused(change, problem):
    machine = fake_machine()
    data = savevm.save(machine, "running")
    change(machine)
    with pytest.raises(VmStateError, match=problem):
        savevm.read(machine, data)


@pytest.mark.parametrize("state", ["", "Running", "no-such-state"])
def test_run_state_that_does_not_exist_is_refused(state):
    machine = fake_machine()
    with pytest.raises(VmStateError, match=r"globalstate\[0\]: there is no run state"):
        savevm.read(machine, savevm.save(machine, state))


def test_run_state_of_another_length_than_said_is_refused():
    machine = fake_machine()
    data = savevm.save(machine, "running").replace(b"\0\0\0\x08running\0", b"\0\0\0\x09running\0")
    with pytest.raises(VmStateError, match="there is no run state"):
        savevm.read(machine, data)


def test_stream_without_run_state_is_refused():
    machine = fake_machine()
    with pytest.raises(VmStateError, match="no section globalstate"):
        savevm.read(
            machine,
            streams.make(CONFIG, own={k: v for k, v in OWN.items() if k[0] != "globalstate"}),
        )
