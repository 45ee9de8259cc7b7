"""Each system call of a new image fails in turn: the guest counts on, there or in the old one."""

import mmap
import os
from collections import Counter

import pytest
from faults.syscalls import Supervisor
from faults.tools import Qmp
from harness import Vm, VmExitedError, wait_until
from harness import pyvmm as pyvmm_command

COUNTER = 0x200000  # where the built-in guest counts
#: What an import consists of: hundreds of calls that end alike. One in so many is tried.
IMPORTING = {"newfstatat", "openat", "read", "lseek", "close", "fstat", "getdents64", "readlink"}
STRIDE = int(os.environ.get("PYVMM_SYSCALL_STRIDE", "60"))
TTY_ASKED = ("ioctl", 0x5401)  # isatty(3), in open()
PARTS = 4
NAME = "victim"
OVER = ("completed", "failed")
KVMCLOCK_CTRL, KVM_IRQ_LINE = ("ioctl", 0xAEAD), ("ioctl", 0x4008AE61)
KVM_SET_CLOCK = ("ioctl", 0x4030AE7B)

EVERY_DEVICE = [
    *("-serial", "null", "-chardev", "ringbuf,id=rb", "-device", "isa-debugcon,chardev=rb"),
    *("-device", "pvpanic", "-device", "isa-debug-exit", "-name", NAME),
    *("-drive", "if=none,id=d0,file=disk,format=raw", "-device", "virtio-blk-device,drive=d0"),
    *("-netdev", "stream,id=n0,server=on,addr.type=unix,addr.path=net.sock"),
    *("-device", "virtio-net-device,netdev=n0", "-device", "virtio-rng-device"),
    *("-chardev", "socket,id=c0,path=con.sock,server=on,wait=off"),
    *("-chardev", "pty,id=p0", "-chardev", "file,id=f0,path=out"),
    *("-device", "virtio-serial-device", "-device", "virtconsole,chardev=c0"),
    *("-device", "virtserialport,chardev=p0,name=port", "-device", "virtserialport,chardev=f0"),
    *("-qmp", "unix:own.sock,server=on,wait=off"),
]


class Victim:
    """A VM with every device under supervision, which is started again when it cannot be updated
    any more, and its guest's counter, which no connection is needed for."""

    def __init__(self, folder):
        self._folder = folder
        self._number = 0
        self.starts = 0
        self.machine = None

    def start(self):
        """A VM that counts."""
        self._number += 1
        self.starts += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        (folder / "disk").write_bytes(bytes(1 << 20))
        ram = f"memory-backend-file,id=ram0,size=64M,mem-path={folder}/ram,share=on"
        self.supervisor = Supervisor(folder)
        self.machine = Vm(
            folder,
            *EVERY_DEVICE,
            *("-object", ram),
            append="counter",
            smp=2,
            monitor=False,
            program=self.supervisor.program(pyvmm_command(), "run"),
        )
        self.machine.start()
        self.machine.expect("counter ready")
        with open(folder / "ram", "rb") as file:
            page = mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ, offset=COUNTER)
        self._counter = memoryview(page).cast("Q")
        self._qmp_path = f"{os.environ['XDG_RUNTIME_DIR']}/pyvmm/{NAME}/qmp.sock"
        wait_until(lambda: os.path.exists(self._qmp_path), "the VM's entry")

    def close(self):
        """End it."""
        if self.machine is not None:
            self.machine.close()
            self.supervisor.close()
            self.machine = None

    def update(self, fail_at=None, running=True):
        """One update, with a call that fails. Whether there was an answer to it.

        :param running: whether the guest runs through it
        """
        if self.machine is None:
            self.start()
        self.supervisor.watch(self.machine.pid, fail_at)
        try:
            with Qmp(self._qmp_path) as qmp:
                qmp.execute("migrate-set-parameters", **{"cpr-exec-running": running})
                qmp.execute("update")
                wait_until(lambda: qmp.execute("query-migrate")["status"] in OVER, "the end of it")
                return qmp.execute("query-status")["status"] == "running"
        except (OSError, VmExitedError):
            return False
        finally:
            self.supervisor.end()

    def check(self, what):
        """The guest counts, in the same process."""
        before = self._counter[0]
        try:
            wait_until(lambda: self._counter[0] > before, "a higher count")
        except AssertionError:
            return f"{what}: the guest stands, {self.machine.has_ended=}"
        return ""


def chosen(calls):
    """Which of a good update's calls are tried: all kinds, before and behind the end of the way
    back, at first and at last; of what importing consists of, a few."""
    # The alarm is stopped before the guest changes hands, and when it has.
    gives_up = [at for at, call in enumerate(calls) if call.gives_up]
    of_import, kinds = [], {}
    for at, call in enumerate(calls):
        if call.name in IMPORTING or call.kind == TTY_ASKED:
            of_import.append(at)
        else:
            kinds.setdefault((at > gives_up[-1], call.kind), []).append(at)
    picked = {at for places in kinds.values() for at in (places[0], places[-1])}
    # Right behind the end of the way back nothing at all may matter.
    near = {at + ahead for at in gives_up for ahead in range(12)}
    return sorted({*picked, *of_import[::STRIDE], *near})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_each_call_fails_in_turn(tmp_path, part):
    victim = Victim(tmp_path)
    lost = []
    tried = Counter()
    try:
        victim.update()
        assert victim.update()
        for at in chosen(victim.supervisor.calls)[part::PARTS]:
            answered = victim.update(at)
            failed = victim.supervisor.failed
            tried[failed is not None] += 1
            if problem := victim.check(f"call {at}, {failed}"):
                lost.append(f"{problem}\n{victim.machine.stderr()}")
            if problem or not answered:
                victim.close()
    finally:
        victim.close()
    print(f"{dict(tried)}, {victim.starts} starts")
    assert not lost, "\n".join(lost)
    assert tried[True] > 20


def calls_of_an_update(folder, *, running):
    """Those of the new image.

    :param running: whether the guest runs through it
    """
    victim = Victim(folder)
    try:
        victim.update(running=running)
        assert victim.update(running=running)
        return victim.supervisor.calls
    finally:
        victim.close()


def test_nothing_that_can_fail_stands_behind_the_takeover(tmp_path):
    """The last that the new image gives KVM is the clock; then it tells the carrier, and the vCPUs
    run, before it does anything else."""
    calls = calls_of_an_update(tmp_path, running=True)
    timer, closed = [at for at, call in enumerate(calls) if call.gives_up]
    main = calls[closed].thread
    # It is set again if the first time was not exact.
    clock = max(at for at in range(timer, closed) if calls[at].kind == KVM_SET_CLOCK)
    takeover = [call for call in calls[clock + 1 : closed] if call.thread == main]
    # And waits for them a little; that may fail.
    assert {call.kind for call in takeover} <= {("clock_gettime", 0), ("nanosleep", 0)}, takeover
    # The vCPUs' threads have done before what they do first.
    assert not [call for call in calls[clock:] if call.kind == KVMCLOCK_CTRL]


def test_nothing_that_can_fail_stands_behind_the_way_back(tmp_path):
    """The same where the guest stands: from there until the vCPUs run the new image only wakes
    threads and raises interrupts."""
    calls = calls_of_an_update(tmp_path, running=False)
    (behind,) = [at for at, call in enumerate(calls) if call.gives_up]
    runs = [at for at, call in enumerate(calls) if call.kind == KVMCLOCK_CTRL]
    assert len(runs) == 2
    between = {call.kind for call in calls[behind + 1 : max(runs)]}
    assert between <= {KVMCLOCK_CTRL, ("write", 0), KVM_IRQ_LINE}, calls[behind : max(runs)]
