"""A guest that counts, for faults to be tried on."""

import mmap
import os

import pytest
from faults.rescue import COUNTER, NAMED, QUICK
from faults.tools import TICKER, faulty
from harness import needs, process, wait_until
from harness.tmpfs import Tmpfs


@pytest.fixture
def ticker(vm):
    """Starts a VM whose guest prints contiguous numbers; options as :class:`harness.Vm`'s."""

    def start(*options, **arguments):
        machine = vm(*options, append=TICKER, **arguments)
        machine.expect(r"tick 2\r\n")
        return machine

    return start


@pytest.fixture
def tmpfs(tmp_path):
    """Makes a :class:`harness.tmpfs.Tmpfs` of a given size."""
    made = []

    def make(size):
        made.append(Tmpfs(tmp_path / f"tmpfs{len(made)}", size))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def orphans(tmp_path):
    """The processes that a VM leaves behind become children of the tests' process, which has their
    exit codes then. Ends what is left."""
    before = {*process.children("self")}
    process.adopt_orphans(True)
    yield
    for folder in tmp_path.iterdir():
        # The carriers first: they would start others.
        for pid in [*process.carriers(folder), *dict(process.others_at_work(folder))]:
            process.kill(pid)
    for pid in {*process.children("self")} - before:
        os.waitpid(pid, process.WALL)
    process.adopt_orphans(False)


@pytest.fixture
def memory_group(tmp_path):
    """A memory control group too small for a Python; its folder."""
    group = needs.memory_group("pyvmm-test", 4 << 20)
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "the end of what is in it")
    group.rmdir()


@pytest.fixture
def impatient(vm):
    """Starts a VM whose guest counts in memory as fast as it can, and whose images have little time
    for an update; the machine and its counter."""

    def start(smp=1):
        machine = vm(*NAMED, append="counter", smp=smp, program=faulty(*QUICK))
        machine.expect("counter ready")
        with open(process.memfd(machine.pid, "pc.ram"), "rb") as ram:
            page = mmap.mmap(ram.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ, offset=COUNTER)

        return machine, memoryview(page).cast("Q")

    return start
