import fcntl
import os
import struct
import subprocess
import sys

import pytest
from harness.process import descriptors
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cpr import state as cpr
from pyvmm.cpr.state import CprState
from pyvmm.errors import PyvmmError, VmStateError

EXAMPLE = CprState(
    {("ram0", 0): 11, ("pc.bios", 0): 12, ("cpr/holder", 4711): 13, ("x", -1): 14},
    {"progress": bytes(64), "chardev/serial0": b"half a li", "empty": b""},
)
DATA = cpr.encode(EXAMPLE)

names = st.text(st.characters(min_codepoint=1, max_codepoint=127), min_size=1, max_size=255)
numbers = st.integers(-(1 << 31), (1 << 31) - 1)
fds = st.dictionaries(st.tuples(names, numbers), st.integers(3, (1 << 31) - 1), max_size=20).filter(
    lambda found: len(set(found.values())) == len(found)
)


def plain(state):
    return state.fds, state.values


def entry(name, *numbers):
    return b"\1" + struct.pack(">I", len(name)) + name + struct.pack(f">{len(numbers)}i", *numbers)


def with_fds(*entries):
    """A state with these entries in its list of descriptors."""
    empty = cpr.encode(CprState({}, {}))
    return empty[:8] + b"".join(entries) + empty[8:]


def in_child(program, fd, *others):
    """The output of a process that was given the state in ``fd``, line by line."""
    return subprocess.run(
        [sys.executable, "-c", "import os\nfrom pyvmm.cpr import state\n" + program],
        env=os.environ | {cpr.ENVIRONMENT: str(fd)},
        pass_fds=[fd, *others],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout.splitlines()


def refusal(fd):
    """What :func:`cpr.inherit` says of the state in ``fd`` in a process of its own."""
    program = (
        "try:\n"
        "    state.inherit()\n"
        "except state.VmStateError as error:\n"
        "    print(error, state.ENVIRONMENT in os.environ)\n"
    )
    return in_child(program, fd)


@given(fds, st.dictionaries(names, st.binary(max_size=300), max_size=20))
def test_what_was_written_is_read(fds, values):
    state = CprState(fds, values)
    assert plain(cpr.decode(cpr.encode(state))) == plain(state)


def test_list_of_descriptors_has_qemus_layout():
    state = CprState({("ram0", 0): 11, ("pc.bios", 3): 258}, {})
    assert cpr.encode(state)[:49] == bytes.fromhex(
        "51435052 00000001"
        "01 00000005 72616d3000 00000000 0000000b"
        "01 00000008 70632e62696f7300 00000003 00000102"
        "00 05"
    )


def test_truncation_is_refused_at_every_byte():
    for end in range(len(DATA)):
        with pytest.raises(VmStateError):
            cpr.decode(DATA[:end])


def test_flipped_bit_is_refused_or_is_data():
    for at in range(len(DATA)):
        for bit in range(8):
            changed = bytearray(DATA)
            changed[at] ^= 1 << bit
            try:
                state = cpr.decode(bytes(changed))
            except VmStateError:
                continue
            assert plain(state) != plain(EXAMPLE)
            assert cpr.encode(state) == bytes(changed)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_state_or_an_error(data):
    for source in (data, DATA[:8] + data):
        try:
            state = cpr.decode(source)
        except VmStateError:
            continue
        assert cpr.encode(state) == source


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "truncated"),
        (b"QEVM" + DATA[4:], "bad magic"),
        (DATA[:4] + struct.pack(">I", 2) + DATA[8:], "version 2 is not supported"),
        (DATA + b"\0", "something follows the end"),
        (DATA + DATA, "something follows the end"),
        (with_fds(entry(b"", 0, 5)), "a name of 0 bytes is malformed"),
        (with_fds(entry(b"\0", 0, 5)), "a name of 1 bytes is malformed"),
        (with_fds(entry(b"ram0", 0, 5)), "a name of 4 bytes is malformed"),
        (with_fds(entry(b"r\0m\0", 0, 5)), "a name of 4 bytes is malformed"),
        (with_fds(entry(b"r\xe4m\0", 0, 5)), "a name of 4 bytes is malformed"),
        (with_fds(entry(b"r" * 256 + b"\0", 0, 5)), "a name of 257 bytes is malformed"),
        (with_fds(b"\1\xff\xff\xff\xffram0\0"), "a name of 4294967295 bytes is malformed"),
        (with_fds(entry(b"a\0", 0, 5), entry(b"a\0", 0, 6)), r"a\[0\] is there twice"),
        (with_fds(entry(b"a\0", 0, 5), entry(b"a\0", 1, 5)), r"a\[1\] cannot be descriptor 5"),
        (with_fds(entry(b"a\0", 0, -1)), r"a\[0\] cannot be descriptor -1"),
        (with_fds(entry(b"a\0", 0, 2)), r"a\[0\] cannot be descriptor 2"),
        (with_fds(b"\2"), "a list does not end where it should"),
        (DATA.replace(b"CprState/pyvmm", b"CprState/other"), "the host-side values are missing"),
        (
            DATA.replace(b" values\0\0\0\1", b" values\0\0\0\2"),
            "host-side values of another version",
        ),
        (DATA.replace(b"empty", b"\0mpty"), "a name of 6 bytes is malformed"),
        (
            with_fds(*(entry(b"%d\0" % n, 0, n) for n in range(3, 4100))),
            "a list does not end where it should",
        ),
    ],
)
def test_malformed_state_is_refused(data, problem):
    with pytest.raises(VmStateError, match=f"^CPR state: {problem}"):
        cpr.decode(data)


def test_value_that_is_longer_than_the_state_is_refused():
    at = DATA.index(b"half") - 4
    with pytest.raises(VmStateError, match="truncated"):
        cpr.decode(DATA[:at] + b"\xff" * 4 + DATA[at + 4 :])


def test_repeated_value_is_refused():
    value = b"\1" + struct.pack(">I", 6) + b"empty\0" + bytes(4)
    assert DATA.endswith(value + b"\0")
    with pytest.raises(VmStateError, match="value empty is there twice"):
        cpr.decode(DATA[:-1] + value + b"\0")


@pytest.mark.parametrize(
    "state",
    [
        CprState({("a" * 256, 0): 5}, {}),
        CprState({("", 0): 5}, {}),
        CprState({("é", 0): 5}, {}),
        CprState({("a", 0): 2}, {}),
        CprState({("a", 0): 5, ("b", 0): 5}, {}),
        CprState({}, {"a\0b": b""}),
        CprState({("a", n): n + 3 for n in range(4097)}, {}),
        CprState({}, {"a": bytes(cpr.MAX_SIZE)}),
    ],
)
def test_what_could_not_be_read_is_not_published(state):
    before = descriptors("self")
    with pytest.raises(VmStateError):
        cpr.publish(state.fds, state.values)
    assert descriptors("self") == before


def test_published_descriptor_closes_on_exec():
    fd = cpr.publish(EXAMPLE.fds, EXAMPLE.values)
    try:
        assert not os.get_inheritable(fd)
        assert os.pread(fd, 1 << 20, 0) == DATA
    finally:
        os.close(fd)


@pytest.fixture
def file(tmp_path):
    """Opens a file of some content with a descriptor from 100 on."""
    opened = []

    def make(content):
        path = tmp_path / f"file{len(opened)}"
        path.write_bytes(content)
        low = os.open(path, os.O_RDWR)
        opened.append(fcntl.fcntl(low, fcntl.F_DUPFD, 100))
        os.close(low)
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


def test_inherited_once_and_closed_on_the_next_exec(file):
    inner = file(b"memory")
    fd = file(cpr.encode(CprState({("ram0", 0): inner}, {"v": b"1"})))
    program = (
        "found = state.inherit()\n"
        "print(found.fds, found.values, [os.get_inheritable(fd) for fd in found.fds.values()])\n"
        f"print(os.path.exists('/proc/self/fd/{fd}'), state.inherit())\n"
        "print(state.ENVIRONMENT in os.environ)\n"
    )
    assert in_child(program, fd, inner) == [
        f"{{('ram0', 0): {inner}}} {{'v': b'1'}} [False]",
        "False None",
        "False",
    ]


def test_descriptor_that_was_not_inherited(file):
    fd = file(cpr.encode(CprState({("ram0", 0): 999}, {})))
    assert refusal(fd) == ["CPR state: ram0[0]: descriptor 999 is missing False"]


def test_state_that_lists_itself(file):
    fd = file(b"")
    os.pwrite(fd, cpr.encode(CprState({("ram0", 0): fd}, {})), 0)
    assert refusal(fd) == [f"CPR state: ram0[0]: descriptor {fd} is missing False"]


@pytest.mark.parametrize(
    "text", ["", "x", "0", "2", "-5", "+9", " 9", "9 ", "0x9", "٣", "9" * 5000, "1e9", "\udcff"]
)
def test_variable_that_is_no_descriptor(text, monkeypatch):
    monkeypatch.setenv(cpr.ENVIRONMENT, text)
    with pytest.raises(VmStateError, match=r"is no descriptor$"):
        cpr.inherit()
    assert cpr.ENVIRONMENT not in os.environ


@pytest.mark.parametrize("number", [999, 2**31 % 10**9])
def test_descriptor_that_is_not_open(number, monkeypatch):
    monkeypatch.setenv(cpr.ENVIRONMENT, str(number))
    with pytest.raises(VmStateError, match=f"descriptor {number}: Bad file descriptor"):
        cpr.inherit()


@pytest.mark.parametrize("kind", ["pipe", "folder", "empty", "terminal", "null", "large"])
def test_descriptor_of_another_kind(kind, tmp_path, monkeypatch):
    others = []
    if kind == "pipe":
        fd, other = os.pipe()
        others.append(other)
    elif kind == "terminal":
        fd, other = os.openpty()
        others.append(other)
    elif kind == "folder":
        fd = os.open(tmp_path, os.O_RDONLY)
    elif kind == "null":
        fd = os.open("/dev/null", os.O_RDONLY)
    else:
        fd = os.memfd_create(kind)
        os.ftruncate(fd, cpr.MAX_SIZE + 1 if kind == "large" else 0)
    monkeypatch.setenv(cpr.ENVIRONMENT, str(fd))
    try:
        with pytest.raises(PyvmmError, match=r"^CPR state: "):
            cpr.inherit()
    finally:
        for open_fd in (fd, *others):
            try:
                os.close(open_fd)
            except OSError:
                assert open_fd == fd  # inherit has closed it


def test_no_variable_is_a_fresh_start(monkeypatch):
    monkeypatch.delenv(cpr.ENVIRONMENT, raising=False)
    assert cpr.inherit() is None
