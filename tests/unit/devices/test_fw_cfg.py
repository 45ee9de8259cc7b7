import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.core.bus import Bus
from pyvmm.core.eventloop import EventLoop
from pyvmm.devices import fw_cfg
from pyvmm.devices.fw_cfg import ERROR, READ, SELECT, SKIP, SLICE, WRITE, Bytes, FilePart, FwCfg
from pyvmm.devices.vmcoreinfo import VmCoreInfo
from pyvmm.errors import RamError, VmStateError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory
from pyvmm.vmstate.cursor import Cursor

SELECTOR, DATA, DMA = 0x510, 0x511, 0x514
#: A control word of a transfer, and where it reads and writes.
ACCESS, BUFFER = 0x1000, 0x2000
RAM_SIZE = 8 << 20
TEXT, NOTE, LONG = 0x20, 0x21, 0x22
LONG_SIZE = 2 * SLICE + 12345
TEXT_DATA = b"hello, firmware"


class Machine:
    """The device on a bus, with memory."""

    def __init__(self, items=None):
        self.loop = EventLoop()
        self.ram = RamBackend(RamConfig("memory-backend-memfd", "ram", RAM_SIZE))
        self.memory = GuestMemory()
        self.memory.add_ram(self.ram, [(0, RAM_SIZE, 0)])
        self.note = VmCoreInfo()
        self.long = os.urandom(LONG_SIZE)
        self.device = FwCfg(self.memory, self.loop)
        self.made = []
        self.device.make_items = self.make
        self.bus = Bus("I/O", 1 << 16)
        self.bus.add(SELECTOR, 12, self.device, "fw_cfg", width=fw_cfg.WIDTH)
        self.device.start()

    def make(self, files):
        self.made.append(dict(files))
        return {0: Bytes(b"QEMU"), TEXT: Bytes(TEXT_DATA), NOTE: self.note, LONG: Bytes(self.long)}

    def select(self, key):
        self.bus.write(SELECTOR, 2, key)

    def take(self, count):
        return bytes(self.bus.read(DATA, 1) for _ in range(count))

    def begin(self, control, length=0, address=BUFFER, access=ACCESS):
        """Start a transfer, as a driver does."""
        self.memory.write(access, struct.pack(">IIQ", control, length, address))
        for port, half in ((DMA, access >> 32), (DMA + 4, access & 0xFFFFFFFF)):
            self.bus.write(port, 4, int.from_bytes(half.to_bytes(4, "big"), "little"))

    @property
    def control(self):
        return int.from_bytes(self.memory.read(ACCESS, 4), "big")

    def transfer(self, *args, **kwargs):
        """Make one, and return its control word when it has ended."""
        self.begin(*args, **kwargs)
        while self.control & ~ERROR:
            self.loop.run_once(0)
        return self.control

    def close(self):
        self.device.close()
        self.ram.close()
        self.loop.close()


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


def test_items_are_made_at_the_first_access(machine):
    assert machine.made == []
    machine.select(0)
    assert machine.made == []
    assert machine.take(6) == b"QEMU\0\0"
    assert machine.made == [{}]
    machine.select(TEXT)
    assert machine.take(5) == b"hello"
    assert len(machine.made) == 1


@pytest.mark.parametrize("key", [TEXT, TEXT | 0x4000])
def test_selecting_begins_anew(machine, key):
    machine.select(key)
    machine.take(3)
    machine.select(key)
    assert machine.take(20) == TEXT_DATA.ljust(20, b"\0")


@pytest.mark.parametrize("key", [0x1F, 0x8000 | TEXT, 0xFFFF, 0x3FFF])
def test_key_that_nobody_has_is_empty(machine, key):
    machine.select(key)
    assert machine.take(3) == bytes(3)
    assert machine.transfer(READ, 4) == 0
    assert machine.transfer(SKIP, 4) == 0
    assert machine.transfer(WRITE, 4) == ERROR


def test_ports_take_only_what_they_have(machine):
    machine.select(TEXT)
    machine.bus.write(DATA, 1, 0x55)
    machine.bus.write(SELECTOR, 1, 0)
    machine.bus.write(SELECTOR, 4, 0)
    machine.bus.write(DMA, 2, 0xFFFF)
    machine.bus.write(DMA + 4, 1, 0xFF)
    assert machine.take(5) == b"hello"
    assert machine.bus.read(SELECTOR, 1) == ord(",")
    assert machine.bus.read(SELECTOR, 2) == 0
    assert machine.take(1) == b" "
    assert machine.bus.read(SELECTOR + 2, 2) == 0xFFFF


def test_signature_of_dma(machine):
    assert machine.bus.read(DMA, 8) == int.from_bytes(b"QEMU CFG", "little")
    assert machine.bus.read(DMA, 4).to_bytes(4, "little") == b"QEMU"
    assert machine.bus.read(DMA + 4, 4).to_bytes(4, "little") == b" CFG"
    assert machine.bus.read(DMA + 1, 1) == ord("E")
    machine.begin(SELECT | TEXT << 16)
    assert machine.bus.read(DMA, 4).to_bytes(4, "little") == b"QEMU"


def test_transfers_read_skip_and_select(machine):
    machine.memory.write(BUFFER, b"x" * 32)
    assert machine.transfer(SELECT | READ | TEXT << 16, 5) == 0
    assert machine.memory.read(BUFFER, 6) == b"hellox"
    assert machine.transfer(SKIP, 2) == 0
    assert machine.transfer(READ, 20) == 0
    assert machine.memory.read(BUFFER, 21) == b"firmware".ljust(20, b"\0") + b"x"
    assert machine.transfer(SKIP, 0xFFFFFFFF) == 0
    assert machine.transfer(SELECT | TEXT << 16, 0xFFFFFFFF, 1 << 40) == 0
    assert machine.take(5) == b"hello"
    # Of several operations the one that reads, and then the one that writes.
    assert machine.transfer(READ | WRITE | SKIP, 1) == 0
    assert machine.memory.read(BUFFER, 1) == b","
    assert machine.transfer(WRITE | SKIP, 1) == ERROR
    assert machine.take(1) == b" "


def test_long_transfer_is_done_in_slices(machine):
    machine.begin(SELECT | READ | LONG << 16, LONG_SIZE + 100)
    # The vCPU goes on, and polls.
    assert machine.control == SELECT | READ | LONG << 16
    assert machine.memory.read(BUFFER, SLICE) == machine.long[:SLICE]
    machine.memory.write(BUFFER + LONG_SIZE, b"x" * 101)
    machine.memory.write(ACCESS + 0x100, struct.pack(">IIQ", READ, 1, 0))
    # One at a time.
    machine.bus.write(DMA + 4, 4, int.from_bytes((ACCESS + 0x100).to_bytes(4, "big"), "little"))
    assert machine.memory.read_u32(ACCESS + 0x100) == ERROR << 24
    steps = 0
    while machine.control:
        machine.loop.run_once(0)
        steps += 1
    assert 2 <= steps <= 4
    assert machine.memory.read(BUFFER, LONG_SIZE + 101) == machine.long + bytes(100) + b"x"


@pytest.mark.parametrize("length", [4, SLICE + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("key", [TEXT, LONG, 0x3FFF])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_transfer_where_no_memory_is_ends_with_an_error(machine, operation, key, length):
    for address in (RAM_SIZE, RAM_SIZE - 2, (1 << 64) - 1, (1 << 64) - 4):
        assert machine.transfer(SELECT | operation | key << 16, length, address) == ERROR
    assert machine.transfer(SELECT | READ, 4) == 0
    assert machine.memory.read(BUFFER, 4) == b"QEMU"


@pytest.mark.parametrize("access", [RAM_SIZE, RAM_SIZE - 8, (1 << 64) - 1, (1 << 64) - 16])
def test_control_word_where_no_memory_is_harms_nobody(machine, access):
    for port, half in ((DMA, access >> 32), (DMA + 4, access & 0xFFFFFFFF)):
        machine.bus.write(port, 4, int.from_bytes(half.to_bytes(4, "big"), "little"))
    assert machine.transfer(SELECT | READ | TEXT << 16, 5) == 0


def test_address_is_of_one_transfer(machine):
    machine.begin(SELECT | READ | TEXT << 16, 1)
    machine.memory.write(ACCESS, struct.pack(">IIQ", READ, 4, BUFFER))
    # The upper half is zero again.
    machine.bus.write(DMA + 4, 4, int.from_bytes(ACCESS.to_bytes(4, "big"), "little"))
    assert machine.memory.read(BUFFER, 4) == b"ello"


def test_write_is_all_or_nothing(machine):
    note = struct.pack("<HHIQ", 1, 1, 0x100, 0x1000)
    machine.memory.write(BUFFER, note + b"x")
    assert machine.transfer(SELECT | WRITE | NOTE << 16, 17) == ERROR
    assert not machine.note.has_vmcoreinfo
    assert machine.transfer(SELECT | WRITE | NOTE << 16, 16) == 0
    assert machine.note.has_vmcoreinfo
    assert machine.note.read(0, 16) == note
    assert machine.transfer(WRITE, 1) == ERROR
    assert machine.transfer(SELECT | WRITE | NOTE << 16, 0) == 0
    assert machine.transfer(SELECT | WRITE | TEXT << 16, 1) == ERROR
    # Nothing is read of the guest's memory for what cannot be written anyhow.
    assert machine.transfer(SELECT | WRITE | LONG << 16, LONG_SIZE, RAM_SIZE) == ERROR


def test_note_of_another_format_is_none(machine):
    machine.memory.write(BUFFER, struct.pack("<HHIQ", 1, 0, 0x100, 0x1000))
    assert machine.transfer(SELECT | WRITE | NOTE << 16, 16) == 0
    assert not machine.note.has_vmcoreinfo
    machine.note.reset()
    assert machine.note.read(0, 16) == struct.pack("<HHIQ", 1, 0, 0, 0)


def test_note_goes_over(machine, carry):
    machine.note.write(0, struct.pack("<HHIQ", 1, 1, 0x100, 0x1000))
    new = VmCoreInfo()
    carry(machine.note, new)
    assert new.has_vmcoreinfo
    assert new.read(0, 16) == machine.note.read(0, 16)


def test_host_without_memory_is_waited_for(machine, monkeypatch):
    reports = []
    machine.memory.report = reports.append
    write, lacks = machine.memory.write, True

    def lacking(gpa, data):
        if lacks and gpa >= BUFFER:
            raise RamError("none left")
        write(gpa, data)

    monkeypatch.setattr(GuestMemory, "write", lambda _self, gpa, data: lacking(gpa, data))
    machine.begin(SELECT | READ | TEXT << 16, 5)
    for _ in range(3):
        machine.loop.run_once(0)
    # Told, and not tried over and over.
    assert 1 <= len(reports) <= 2
    assert machine.device.is_transferring
    machine.device.drain()
    lacks = False
    machine.loop.run_once(0)
    assert machine.device.is_transferring
    machine.device.start()
    machine.loop.run_once(0)
    assert machine.control == 0
    assert machine.memory.read(BUFFER, 5) == b"hello"


def test_only_a_guest_that_used_it_has_state(machine):
    device = machine.device
    assert device.is_optional
    assert not device.has_state
    machine.select(TEXT)
    assert device.has_state
    machine.select(0)
    assert not device.has_state
    machine.take(1)
    assert device.has_state
    device.reset()
    assert not device.has_state
    machine.bus.write(DMA, 4, 1)
    assert device.has_state


def test_reading_goes_on_after_an_update(machine, carry):
    machine.select(TEXT)
    machine.take(7)
    new = Machine()
    carry(machine.device, new.device)
    assert new.take(8) == b"firmware"
    new.close()


def test_transfer_goes_on_after_an_update(machine, carry):
    machine.begin(SELECT | READ | LONG << 16, LONG_SIZE)
    machine.device.drain()
    machine.loop.run_once(0)
    new = Machine()
    new.long = machine.long
    new.memory.write(ACCESS, machine.memory.read(ACCESS, 4))
    carry(machine.device, new.device)
    assert new.control
    new.device.start()
    while new.control:
        new.loop.run_once(0)
    left = slice(SLICE, LONG_SIZE)
    assert new.memory.read(BUFFER + SLICE, LONG_SIZE - SLICE) == machine.long[left]
    new.close()


def test_impossible_state_is_refused(machine, encode):
    data = bytearray(encode(machine.device))
    data[2 + 4 + 4 + 1 + 8 + 3] = 0x40
    with pytest.raises(VmStateError, match="none of a transfer"):
        machine.device.vmstate.load(Cursor(bytes(data)), 1)


def test_items_are_made_anew_when_the_files_are_others(machine):
    machine.select(0)
    machine.take(1)
    machine.device.lend({"-kernel": 5})
    assert machine.take(1) == b"E"
    assert machine.made == [{}, {"-kernel": 5}]


@pytest.mark.parametrize(("key", "asks"), [(0x11, True), (0x4012, True), (TEXT, False)])
def test_new_image_asks_for_the_files_that_are_being_read(machine, key, asks):
    asked = []
    machine.device.ask_files = lambda: asked.append(1)
    machine.select(key)
    machine.device.start()
    assert bool(asked) == asks


def test_part_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    with path.open("r+b") as file:
        part = FilePart(file.fileno(), 3, 10000)
        assert part.read(0, 9) == bytes(range(3, 12))
        assert [part.read(at, 1)[0] for at in (0, 1, 9999, 5000)] == [3, 4, 18, (5003) % 256]
        # What is there no more is zeros, and nobody fails.
        file.truncate(8)
        assert part.read(0, 8) == bytes((3, 4, 5, 6, 7, 0, 0, 0))
    assert part.read(0, 8) == bytes(8)


controls = st.tuples(
    st.sampled_from([0, READ, WRITE, SKIP, SELECT, ERROR]), st.integers(0, 0xFFFFFFFF)
).map(lambda pair: pair[0] | pair[1])
addresses = st.one_of(
    st.integers(BUFFER, RAM_SIZE + 0x1000), st.integers(0, (1 << 64) - 1), st.just(ACCESS)
)
actions = st.one_of(
    st.tuples(st.just("in"), st.integers(SELECTOR - 1, SELECTOR + 13), st.sampled_from([1, 2, 4])),
    st.tuples(
        st.just("out"),
        st.integers(SELECTOR - 1, SELECTOR + 13),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([0, TEXT, NOTE, LONG]) | st.integers(0, 0xFFFFFFFF),
    ),
    st.tuples(st.just("dma"), controls, st.integers(0, 64) | st.integers(0, 0xFFFFFFFF), addresses),
    st.tuples(st.just("run")),
    st.tuples(st.just("stop")),
)


@given(st.lists(actions, max_size=30))
def test_any_accesses(sequence):
    machine = Machine()
    try:
        for action, *arguments in sequence:
            if action == "in":
                port, size = arguments
                assert 0 <= machine.bus.read(port, size) < 1 << 8 * size
            elif action == "out":
                port, size, value = arguments
                machine.bus.write(port, size, value & (1 << 8 * size) - 1)
            elif action == "dma":
                machine.begin(*arguments)
            elif action == "stop":
                machine.device.drain()
                machine.device.start()
            else:
                machine.loop.run_once(0)
        data = bytearray()
        machine.device.vmstate.save(data, machine.device.save())
        machine.device.vmstate.load(Cursor(bytes(data)), 1)
        # Each transfer comes to its end.
        for _ in range(RAM_SIZE // SLICE + 2):
            machine.loop.run_once(0)
        assert not machine.device.is_transferring
        assert machine.transfer(SELECT | READ, 4) == 0
        assert machine.memory.read(BUFFER, 4) == b"QEMU"
    finally:
        machine.close()
