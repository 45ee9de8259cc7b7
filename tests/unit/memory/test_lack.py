"""Memory that the host cannot back: errors that name it, and never a signal."""

import os
import signal
import subprocess
import sys

import pytest

from pyvmm import _native
from pyvmm.errors import RamError
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.guest import GuestMemory, MemoryRegion

PAGE = 4096
SIZE = 16 * PAGE


@pytest.fixture
def cut(tmp_path):
    """16 pages of memory in a file that ends after the eighth, and the file."""
    path = tmp_path / "ram"
    backend = RamBackend(
        RamConfig("memory-backend-file", "ram0", SIZE, mem_path=str(path), share=True)
    )
    memory = GuestMemory()
    memory.add_ram(backend, [(0, SIZE, 0)])
    os.truncate(path, 8 * PAGE)
    yield memory, path
    backend.close()


HALF = 8 * PAGE
ACCESSES = {
    "read": lambda memory: memory.read(HALF - 10, 20),
    "read 8": lambda memory: memory.read_u64(HALF),
    "read 1": lambda memory: memory.read_u8(HALF),
    "write": lambda memory: memory.write(HALF - 10, bytes(20)),
    "write 2": lambda memory: memory.write_u16(HALF, 1),
    "write 8": lambda memory: memory.write_u64(SIZE - 8, 1),
    "fill": lambda memory: memory.fill(0, SIZE, 7),
    "touch": lambda memory: memory.touch(HALF - 1, 2),
    "look": lambda memory: memory.touch(0, SIZE, writable=False),
}


@pytest.mark.parametrize("access", ACCESSES)
def test_access(cut, access):
    memory, path = cut
    for _ in range(2):
        with pytest.raises(RamError) as caught:
            ACCESSES[access](memory)
        assert str(caught.value).startswith(f"memory ram0 ({str(path)!r}), guest address 0x")
        assert str(caught.value).endswith(
            ": the host cannot back it: its file has been cut to 32K; give it 64K again"
            " (truncate -s)"
        )
    os.truncate(path, SIZE)
    ACCESSES[access](memory)


def test_touch_changes_nothing(cut):
    memory, _ = cut
    memory.write(0, bytes(range(256)) * 16)
    memory.touch(5, 2 * PAGE)
    assert memory.read(0, PAGE) == bytes(range(256)) * 16


def test_copies_between_buffers(cut):
    memory, _ = cut
    view = memory.view(HALF - 8, 16)
    for arguments in ((view, bytes(16)), (bytearray(16), view)):
        with pytest.raises(OSError, match="Bad address"):
            _native.copy(*arguments)
    _native.copy(view[:8], b"abcdefgh")
    assert memory.read(HALF - 8, 8) == b"abcdefgh"
    with pytest.raises(ValueError, match="sizes"):
        _native.copy(view, bytes(15))
    view.release()


def test_error_without_an_address_names_all_of_it(cut):
    memory, _ = cut
    rom = RamBackend(RamConfig("memory-backend-memfd", "rom", PAGE))
    memory.add(MemoryRegion("rom", SIZE, PAGE, rom, readonly=True))
    text = str(memory.fault())
    assert "memory ram0 " in text
    assert "rom" not in text.split("/")[-1]


@pytest.mark.parametrize(
    "arguments", [(), (1,), (1, 2, 3, 4), ("a", 1), (0, -1), (-1, 1), (1 << 64, 1)], ids=str
)
@pytest.mark.parametrize("name", ["peek", "load", "touch"])
def test_wrong_arguments_are_exceptions(name, arguments):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        getattr(_native, name)(*arguments)


def test_threads_survive_it_too(cut):
    memory, _ = cut
    from pyvmm.core.threads import Event, spawn

    found, done = [], Event()

    def work():
        try:
            memory.read(HALF, 1)
        except RamError as error:
            found.append(error)
        done.set()

    spawn(work, found.append)
    assert done.wait(10)
    assert isinstance(found[0], RamError)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_other_bus_errors_end_the_process():
    done = run(
        "import mmap, os, tempfile\n"
        "from pyvmm import _native\n"
        "file = tempfile.TemporaryFile()\n"
        "file.truncate(4096)\n"
        "view = mmap.mmap(file.fileno(), 4096)\n"
        "file.truncate(0)\n"
        "view[0]\n"
    )
    assert done.returncode == -signal.SIGBUS


def test_a_signal_from_elsewhere_ends_the_process():
    done = run("import os\nfrom pyvmm import _native\nos.kill(os.getpid(), 7)\n")
    assert done.returncode == -signal.SIGBUS


def test_a_page_that_nobody_touches_is_no_reason_to_end():
    """BUS_MCEERR_AO, which a process may send itself."""
    done = run(
        "import ctypes, os\n"
        "from pyvmm import _native\n"
        "info = (ctypes.c_int * 32)(7, 0, 5)\n"
        "assert not ctypes.CDLL(None).syscall(129, os.getpid(), 7, info)\n"
        "print('alive')\n"
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")
