"""The host that the figures are of: what they depend on beside the code."""

import fcntl
import os
import platform
import re
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from harness.kvm_machine import CODE3, Machine

import pyvmm
from bench.machines import Qemu, QemuDefault, Vmm, qemu_version

THP = "/sys/kernel/mm/transparent_hugepage"
GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
EXITS, ROUNDS = 200, 50
KVM_RUN, KVM_EXIT_IO = 0xAE80, 2
UNKNOWN = "unknown"
# out 0x80, al; jmp to it
PORT_LOOP = b"\xe6\x80\xeb\xfc"


def facts():
    """What there is to say of it, in an order for people; numbers, texts and lists."""
    load = os.getloadavg()  # before this adds to it
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pyvmm": pyvmm.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "qemu": "{}.{}".format(*qemu_version()) if shutil.which(Qemu.program) else "absent",
        "kernel": platform.release(),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "governor": _setting(GOVERNOR),
        "kvm": sorted(name for name in os.listdir("/sys/module") if name.startswith("kvm")),
        "exit, ns": exit_cost(),
        "memory": {kind.label: kind.memory for kind in (Vmm, Qemu, QemuDefault)},
        "shmem_enabled": _setting(f"{THP}/shmem_enabled"),
        "transparent_hugepage": _setting(f"{THP}/enabled"),
        "load": load,
    }


def exit_cost():
    """Nanoseconds of an exit to user space and back: a guest in ring 3, which every KVM runs on the
    processor itself, does nothing but write to a port, and nothing but KVM_RUN is called. The
    fastest of some rounds; "unknown" if the guest cannot do that here."""
    machine = Machine()
    try:
        machine.spin_in_ring_3()
        machine.ram[CODE3 : CODE3 + len(PORT_LOOP)] = PORT_LOOP
        regs = machine.vcpu.get_regs()
        regs.rflags |= 3 << 12  # it may use ports
        machine.vcpu.set_regs(regs)
        cost = round(min(_exits(machine.vcpu.fd) for _ in range(ROUNDS)))
        return cost if machine.vcpu.mapping.exit_reason == KVM_EXIT_IO else UNKNOWN
    finally:
        machine.close()


def _exits(fd):
    start = time.perf_counter_ns()
    for _ in range(EXITS):
        fcntl.ioctl(fd, KVM_RUN, 0)
    return (time.perf_counter_ns() - start) / EXITS


def chosen(text):
    """The value of a setting that the kernel shows among all that there are: ``a [b] c``."""
    found = re.search(r"\[(\S+)\]", text)
    return found[1] if found else text.strip()


def _setting(path):
    try:
        return chosen(Path(path).read_text())
    except OSError:
        return UNKNOWN


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
