"""Huge pages made of memory that is there, and memory mapped ahead, with the kernel; what the host
may answer, with a fake of it."""

import errno
import os
import subprocess
import sys

import pytest
from harness import needs
from harness.process import threads, wait_until
from harness.tmpfs import Tmpfs

from pyvmm.cpr.handover import HUGE, Handover
from pyvmm.errors import HostError
from pyvmm.memory import upkeep
from pyvmm.memory.backend import HUGE_PAGE, RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.upkeep import LEAST, Upkeep

PAGE, PAGES = 4096, 512
COUNT = 4  # huge pages in a block
WAIT_S = 10.0


def make(kind="memory-backend-memfd", size=COUNT * HUGE_PAGE, **more):
    return RamBackend(RamConfig(kind, "ram0", size, **more))


@pytest.fixture
def backend():
    backend = make()
    yield backend
    backend.close()


@pytest.fixture
def keep(loop, monkeypatch):
    """Makes an :class:`Upkeep` that looks at once, and ends it."""
    monkeypatch.setattr(upkeep, "FIRST_S", 0)
    kept = []

    def start(*backends, handover=None, collapses=True):
        kept.append(Upkeep(loop, handover or Handover(), [*backends], collapses=collapses))
        return kept[-1]

    yield start
    assert all(each.close() for each in kept)
    wait_until(lambda: "upkeep" not in threads("self"), "no thread is left")


def touch(backend, number, pages=PAGES):
    """Write to so many pages of one huge page."""
    for page in range(number * PAGES, number * PAGES + pages):
        backend.view[page * PAGE] = page & 0xFF


def holds(backend, number, pages=PAGES):
    first = number * PAGES
    return all(backend.view[page * PAGE] == page & 0xFF for page in range(first, first + pages))


def turn(loop, condition, what):
    """Serve the loop until the condition holds."""

    def look():
        loop.run_once(0.01)
        return condition()

    wait_until(look, what, WAIT_S)


def state(care, backend):
    return care.describe(backend)["state"]


def await_look(loop, care, backend):
    """Wait until the first look is over."""
    turn(loop, lambda: state(care, backend) == "working", "the look begins")
    turn(loop, lambda: state(care, backend) != "working", "the look ends")


def smaps(backend):
    """Sums in KiB over the mapping's lines of /proc/self/smaps."""
    sums, inside = {}, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            head, *rest = line.split()
            if not head.endswith(":"):
                start = int(head.partition("-")[0], 16)
                inside = backend.address <= start < backend.address + backend.size
            elif inside and rest and rest[0].isdecimal():
                sums[head[:-1]] = sums.get(head[:-1], 0) + int(rest[0])
    return sums


def huge_kib(backend):
    sums = smaps(backend)
    return sum(sums.get(name, 0) for name in ("ShmemPmdMapped", "FilePmdMapped", "AnonHugePages"))


def blocks_kib(backend):
    return os.fstat(backend.fd).st_blocks // 2


# ---- with the kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("memory-backend-memfd", {}),
        ("memory-backend-memfd", {"prealloc": True}),
        ("memory-backend-ram", {}),
        ("memory-backend-file", {"mem_path": "/dev/shm", "share": True}),
    ],
)
def test_what_is_there_becomes_huge(loop, keep, kind, more):
    needs.collapse()
    backend = make(kind, **more)
    for number in range(COUNT):
        touch(backend, number)
    care = keep(backend)
    await_look(loop, care, backend)
    told = care.describe(backend)
    assert (told["huge"], told.get("reason")) == (COUNT * HUGE_PAGE, None)
    assert told["longest-ms"] > 0
    assert all(holds(backend, number) for number in range(COUNT))
    assert huge_kib(backend) == COUNT * HUGE_PAGE // 1024
    assert care.close()
    backend.close()


def test_what_is_not_there_stays_so(loop, keep, backend):
    """Neither a page that was never touched, nor one of which too much was not, takes memory."""
    needs.collapse()
    touch(backend, 1)
    touch(backend, 2, LEAST - 1)
    before = blocks_kib(backend)
    care = keep(backend)
    await_look(loop, care, backend)
    assert care.describe(backend)["huge"] == HUGE_PAGE
    assert blocks_kib(backend) == before
    assert holds(backend, 2, LEAST - 1)


def test_nearly_all_is_enough_and_is_seen_later(loop, keep, backend, monkeypatch):
    needs.collapse()
    monkeypatch.setattr(upkeep, "SHORTEST_S", 0.05)
    touch(backend, 1, LEAST - 1)
    care = keep(backend)
    await_look(loop, care, backend)
    assert care.describe(backend)["huge"] == 0
    touch(backend, 1, LEAST)
    turn(loop, lambda: care.describe(backend)["huge"], "the next look")
    assert holds(backend, 1, LEAST)
    assert blocks_kib(backend) == HUGE_PAGE // 1024


def test_where_room_is_short_all_has_to_be_there(loop, keep, tmp_path):
    needs.collapse()
    room = Tmpfs(tmp_path / "room", "16M")
    try:
        backend = make("memory-backend-file", mem_path=str(room.path / "ram"), share=True)
        touch(backend, 0, PAGES - 1)
        touch(backend, 1)
        care = keep(backend)
        await_look(loop, care, backend)
        assert care.describe(backend)["huge"] == HUGE_PAGE
        assert blocks_kib(backend) == (2 * PAGES - 1) * PAGE // 1024
        assert care.close()
        backend.close()
    finally:
        room.close()


def test_off_makes_none(loop, keep, backend):
    touch(backend, 0)
    care = keep(backend, collapses=False)
    turn(loop, lambda: not loop._timers, "there is nothing to do")
    assert care.describe(backend) == {"state": "off", "huge": 0}
    assert huge_kib(backend) == 0


def test_a_file_on_a_disk_is_refused_with_the_reason(loop, keep, tmp_path):
    needs.disk(tmp_path)
    backend = make("memory-backend-file", mem_path=str(tmp_path / "ram"), share=True)
    touch(backend, 0)
    care = keep(backend)
    await_look(loop, care, backend)
    assert state(care, backend) == "refused"
    assert "a file system in memory" in care.describe(backend)["reason"]
    assert holds(backend, 0)
    turn(loop, lambda: not loop._timers or loop.run_once(0.1), "nobody looks any more")
    assert care.close()
    backend.close()


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (lambda: make(size=HUGE_PAGE - PAGE), "smaller than a huge page"),
        (lambda: make(share=False), "a private copy of a file"),
    ],
)
def test_what_cannot_have_any(loop, keep, backend, reason):
    backend = backend()
    care = keep(backend)
    turn(loop, lambda: not loop._timers, "there is nothing to do")
    told = care.describe(backend)
    assert (told["state"], told["huge"]) == ("off", 0)
    assert reason in told["reason"]
    assert care.close()
    backend.close()


IN_GROUP = """
import os, sys
from pyvmm.memory.backend import RamBackend
from pyvmm.memory.config import RamConfig
from pyvmm.memory.upkeep import Block
group = sys.argv[1]
open(f"{group}/cgroup.procs", "w").write(str(os.getpid()))
backend = RamBackend(RamConfig("memory-backend-memfd", "ram0", 16 << 20, prealloc=True))
(limit, usage) = ("max", "current") if os.path.exists(f"{group}/memory.max") else (
    "limit_in_bytes", "usage_in_bytes")
used = int(open(f"{group}/memory.{usage}").read())
block = Block(backend, b"")
for room in (1 << 20, 16 << 20):
    open(f"{group}/memory.{limit}", "w").write(str(used + room))
    block.begin()
    block.collapse()
    print(block.made, block.reason)
"""


def test_a_control_group_without_room(tmp_path):
    """Has its memory as it is: nobody is killed for a huge page, and later there is one."""
    needs.collapse()
    group = needs.memory_group(f"pyvmm-test-{os.getpid()}", 1 << 30)
    try:
        command = [sys.executable, "-c", IN_GROUP, str(group)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "0 the control group may have no more memory\n8 \n"


def mapped_again(backend):
    """The memory as the next image has it: another mapping, with nothing in its tables."""
    return RamBackend(backend.config, os.dup(backend.fd))


def test_memory_that_was_handed_over_is_mapped_and_gets_no_pages(loop, keep, backend):
    touch(backend, 0, 7)
    touch(backend, 2, 300)
    before = blocks_kib(backend)
    new = mapped_again(backend)
    assert smaps(new)["Rss"] == 0
    care = keep(new, handover=Handover({}), collapses=False)
    turn(loop, lambda: smaps(new)["Rss"] == 307 * 4, "what there is is mapped")
    turn(loop, lambda: not loop._timers, "and nothing is to be done any more")
    assert blocks_kib(new) == before
    assert holds(new, 2, 300)
    assert care.close()
    new.close()


def test_the_next_image_knows_what_is_huge(loop, keep, backend, monkeypatch):
    needs.collapse()
    touch(backend, 1)
    handover = Handover()
    care = keep(backend, handover=handover)
    await_look(loop, care, backend)
    assert care.close()
    states = handover.states()
    assert states == {f"{HUGE}/ram0": bytes([0, 1, 0, 0])}
    new = mapped_again(backend)
    care = keep(new, handover=Handover({}, states))
    assert care.describe(new) == {"state": "waiting", "huge": HUGE_PAGE}
    await_look(loop, care, new)
    # Mapped as one, and not made again.
    assert huge_kib(new) == HUGE_PAGE // 1024
    assert care.describe(new) == {"state": "waiting", "huge": HUGE_PAGE}
    assert care.close()
    new.close()


def test_a_state_of_other_memory_is_nothing(keep, backend):
    care = keep(backend, handover=Handover({}, {f"{HUGE}/ram0": b"\1" * (COUNT + 1)}))
    assert care.describe(backend)["huge"] == 0


def test_an_update_finds_it_at_rest(loop, keep, backend, monkeypatch):
    """And where that fails it goes on."""
    needs.collapse()
    monkeypatch.setattr(upkeep, "WORK_NS", 100_000)
    monkeypatch.setattr(upkeep, "REST_NS", int(100e9))
    monkeypatch.setattr(upkeep, "LONGEST_REST_NS", int(100e9))
    for number in range(COUNT):
        touch(backend, number)
    care = keep(backend)
    # In the long rest after the first.
    turn(loop, lambda: care.describe(backend)["huge"] == HUGE_PAGE, "one is made")
    care.quiesce()
    wait_until(lambda: "upkeep" not in threads("self"), "the thread ends")
    turn(loop, lambda: not loop._timers and state(care, backend) == "paused", "it is at rest")
    assert care.describe(backend)["huge"] == HUGE_PAGE
    care.unquiesce()
    turn(loop, lambda: care.describe(backend)["huge"] == 2 * HUGE_PAGE, "it goes on")
    assert state(care, backend) == "working"


def test_quiesced_before_it_began(loop, keep, backend):
    touch(backend, 0)
    care = keep(backend)
    care.quiesce()
    loop.run_once(0.05)
    assert care.describe(backend) == {"state": "paused", "huge": 0}
    assert huge_kib(backend) == 0


# ---- what the host may answer ------------------------------------------------------------------


class Kernel:
    """Answers for the kernel: the result of each look, and the error that one page had."""

    def __init__(self, results):
        self.results = list(results)
        self.looks = 0

    def pyvmm_collapse(self, work):
        self.looks += 1
        result, work.error, work.made = self.results.pop(0) if self.results else (0, 0, work.made)
        return result

    def pyvmm_map_ahead(self, work):
        return -errno.EINVAL

    def pyvmm_stop_upkeep(self, work):
        pass


@pytest.fixture
def answer(monkeypatch):
    """Has the kernel answer so: (result, error of a page, huge pages) for each look."""
    monkeypatch.setattr(upkeep, "SHORTEST_S", 0.01)

    def install(*results):
        kernel = Kernel(results)
        monkeypatch.setattr(upkeep, "lib", kernel)
        return kernel

    return install


@pytest.mark.parametrize(
    ("result", "error", "made", "reason"),
    [
        (-errno.ENOMEM, errno.ENOMEM, 0, "no huge page free"),
        (-errno.EBUSY, errno.EBUSY, 2, "control group"),
        (0, errno.EAGAIN, 0, "in use"),
        (0, errno.EINVAL, 1, "Invalid argument"),
        (0, errno.EIO, 0, os.strerror(errno.EIO)),
    ],
)
def test_what_may_pass_is_told_and_tried_again(
    loop, keep, backend, answer, result, error, made, reason
):
    kernel = answer((result, error, made), (0, 0, 3))
    care = keep(backend)
    turn(loop, lambda: "reason" in care.describe(backend), "the reason")
    assert reason in care.describe(backend)["reason"]
    assert state(care, backend) != "refused"
    turn(loop, lambda: kernel.looks > 1, "the next look")
    turn(loop, lambda: "reason" not in care.describe(backend), "nothing is in the way")
    assert care.describe(backend)["huge"] == 3 * HUGE_PAGE


def test_a_kernel_without_it_is_asked_once(loop, keep, backend, answer):
    kernel = answer((0, errno.EINVAL, 0))
    care = keep(backend)
    turn(loop, lambda: state(care, backend) == "refused", "the kernel's answer")
    assert "Linux 6.1" in care.describe(backend)["reason"]
    turn(loop, lambda: not loop._timers, "nobody looks any more")
    assert kernel.looks == 1


def test_one_block_may_be_refused_and_another_not(loop, keep, backend, answer):
    other = RamBackend(RamConfig("memory-backend-memfd", "other", HUGE_PAGE))
    kernel = answer((0, errno.EINVAL, 0))
    care = keep(backend, other)
    turn(loop, lambda: kernel.looks > 3, "further looks")
    assert [state(care, each) == "refused" for each in (backend, other)] == [True, False]
    assert care.close()
    other.close()


def test_a_kernel_that_does_not_map_ahead(loop, keep, backend, answer):
    kernel = answer()
    care = keep(backend, handover=Handover({}))
    turn(loop, lambda: kernel.looks, "it goes on to the huge pages")
    assert "reason" not in care.describe(backend)


def test_looks_become_rare_while_there_is_nothing_to_do(loop, keep, backend, answer, monkeypatch):
    kernel = answer(*[(0, 0, 0)] * 9)
    delays = []
    later = loop.call_later
    monkeypatch.setattr(
        loop, "call_later", lambda delay, call: delays.append(delay) or later(0, call)
    )
    monkeypatch.setattr(upkeep, "SHORTEST_S", 2)
    keep(backend)
    turn(loop, lambda: len(delays) > 7, "looks")
    assert kernel.looks >= 6
    assert delays[1:8] == [4, 8, 16, 32, 60, 60, 60]


def test_no_thread_to_be_had(loop, keep, backend, answer, monkeypatch):
    kernel = answer((0, 0, 1))
    spawn = upkeep.spawn

    def refuse(*_):
        monkeypatch.setattr(upkeep, "spawn", spawn)
        raise HostError("the host allows no further thread")

    monkeypatch.setattr(upkeep, "spawn", refuse)
    care = keep(backend)
    turn(loop, lambda: "reason" in care.describe(backend), "the reason")
    assert care.describe(backend)["reason"] == "the host allows no further thread"
    turn(loop, lambda: kernel.looks, "the next look has one")
    turn(loop, lambda: care.describe(backend).get("reason") is None, "no reason any more")


def test_a_thread_that_dies_is_told_of_and_there_is_another(
    loop, keep, backend, answer, monkeypatch
):
    crashes = []
    monkeypatch.setattr(upkeep, "report_crash", crashes.append)
    kernel = answer()
    calls = iter([lambda work: 1 / 0])
    work = kernel.pyvmm_collapse
    monkeypatch.setattr(kernel, "pyvmm_collapse", lambda it: next(calls, work)(it))
    keep(backend)
    turn(loop, lambda: kernel.looks, "another thread")
    assert [type(error) for error in crashes] == [ZeroDivisionError]


def test_a_thread_that_does_not_end_keeps_the_memory(loop, backend, answer, monkeypatch):
    kernel = answer()
    monkeypatch.setattr(upkeep, "FIRST_S", 0)
    monkeypatch.setattr(upkeep, "END_TIMEOUT_S", 0.01)
    monkeypatch.setattr(upkeep, "spawn", lambda *_: None)
    care = Upkeep(loop, Handover(), [backend], collapses=True)
    turn(loop, lambda: state(care, backend) == "working", "it begins")
    assert not care.close()
    assert not kernel.looks
