"""An experiment on both sides of an exec: a process makes a guest, whose vCPU a servant runs, and
executes a new image of itself; the experiment is a function there.

As a program it is that process, both images of it.
"""

import contextlib
import functools
import json
import mmap
import os
import runpy
import signal
import subprocess
import sys
import tempfile

from harness import DEADLINE_S, wait_until
from harness.assembler import assemble
from harness.kvm_machine import Machine
from harness.process import cmdline, environment
from harness.servant import CLONE_SIGHAND, CLONE_THREAD, Page
from harness.sources import ROOT
from pyvmm._native import ffi

RAM = 0xA0000
CODE = 0x1000
COUNT = 0x3000
COUNTING = "1: incl 0x3000; jmp 1b"


class Lab:
    """What an experiment has, in the new image.

    :param facts: what the old image tells, and descriptors, which went through the exec
    :ivar at_exec: how far the guest had counted when the old image called execve
    :ivar at_start: how far when the new one began
    """

    def __init__(self, facts):
        self.facts = facts
        self.ram = mmap.mmap(facts["ram"], RAM)
        self.at_start = self.count
        self.at_exec = facts["count"]
        self.vm_fd, self.vcpu_fd, self.kvm_fd = facts["vm"], facts["vcpu"], facts["kvm"]
        self.page = Page(facts["page"], facts["base"])
        #: The first is in KVM_RUN. The last was a thread of the old image.
        self.runner, self.helper, self.comrade = self.page.servants[:3]
        self.run = mmap.mmap(self.vcpu_fd, facts["run_size"])

    @property
    def count(self):
        return int.from_bytes(self.ram[COUNT : COUNT + 4], "little")

    def counts(self):
        """Wait for the guest to count."""
        before = self.count
        wait_until(lambda: self.count != before, "a higher count")

    def stop(self):
        """Have the vCPU of a guest that counts out of KVM_RUN, by a signal; what KVM_RUN said."""
        self.counts()  # it is in there: one signal is enough
        self.runner.kick()
        return self.runner.wait()

    def go_on(self):
        """Have it there again."""
        self.runner.run(self.vcpu_fd)

    def get(self, servant, fd, name, kind, content=b""):
        """A pointer to the structure that an ioctl of a servant fills."""
        found = ffi.new(f"{kind} *")
        size = ffi.sizeof(kind)
        result = servant.ioctl(fd, name, content or bytes(size))
        assert result >= 0, (name, os.strerror(-result))
        ffi.buffer(found)[:] = servant.data[:size]
        return found


class Process:
    """The process of an experiment.

    :param experiment: a function of a module's top level
    :param guest: instructions in real mode
    """

    def __init__(self, experiment, guest=COUNTING):
        self.page = Page()
        self.ram_fd = os.memfd_create("ram")
        os.ftruncate(self.ram_fd, RAM)
        self.ram = mmap.mmap(self.ram_fd, RAM)
        code = experiment.__code__
        facts = {"page": self.page.fd, "ram": self.ram_fd, "guest": guest}
        where = [code.co_filename, experiment.__name__]
        tests = str(ROOT / "tests")
        # Not a pipe, whose end would come when the last servant is gone.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "harness.exec_lab", *where, json.dumps(facts)],
            pass_fds=[self.page.fd, self.ram_fd],
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env=environment(PYTHONPATH=tests),
        )

    def wait(self):
        """Wait for its end; its exit status, and what it said."""
        code = self.popen.wait(2 * DEADLINE_S)
        self._said.seek(0)
        return code, self._said.read()

    def close(self):
        self.popen.kill()
        self.popen.wait()
        self._said.close()
        for servant in self.page.servants:
            # Most have ended with it; and the words of what shares its memory are its own.
            with contextlib.suppress(OSError):
                if servant.pid and "harness.exec_lab" in cmdline(servant.pid):
                    os.kill(servant.pid, signal.SIGKILL)
        os.close(self.page.fd)
        os.close(self.ram_fd)


def through_exec(experiment=None, **arguments):
    """Make a test of a function that is called with a :class:`Lab` in the new image."""
    if experiment is None:
        return functools.partial(through_exec, **arguments)

    def test():
        process = Process(experiment, **arguments)
        try:
            code, text = process.wait()
            assert code == 0, text
        finally:
            process.close()

    test.__name__, test.__doc__ = experiment.__name__, experiment.__doc__
    test.experiment = experiment
    return test


def first_image(path, name, facts):
    ram_fd = facts["ram"]
    machine = Machine(ram=mmap.mmap(ram_fd, RAM))
    machine.load(assemble(facts["guest"]), CODE)
    page = Page(facts["page"])
    facts["pidfd"], facts["eventfd"] = os.pidfd_open(os.getpid()), os.eventfd(0)
    runner, helper, comrade = page.servants[:3]
    runner.start()
    helper.start()
    comrade.start(CLONE_SIGHAND | CLONE_THREAD)
    runner.run(machine.vcpu.fd)
    count = memoryview(machine.ram)[COUNT : COUNT + 4]
    wait_until(lambda: any(count), "the guest's counter")
    facts |= {
        "base": page.base,
        "vm": machine.vm.fd,
        "vcpu": machine.vcpu.fd,
        "kvm": machine.system.fd,
        "run_size": machine.system.get_vcpu_mmap_size(),
        "pid": os.getpid(),
    }
    for each in ("vm", "vcpu", "kvm", "eventfd", "page", "ram"):
        os.set_inheritable(facts[each], True)
    facts["count"] = int.from_bytes(count, "little")
    words = [sys.executable, "-m", "harness.exec_lab", path, name, json.dumps(facts)]
    os.execv(sys.executable, words)


def main():
    path, name, facts = sys.argv[1:]
    facts = json.loads(facts)
    if "base" not in facts:
        first_image(path, name, facts)
    lab = Lab(facts)
    found = runpy.run_path(path)[name]
    getattr(found, "experiment", found)(lab)


if __name__ == "__main__":
    main()
