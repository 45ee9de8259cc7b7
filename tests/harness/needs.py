"""What tests need of the host. Run as a program, it installs the Debian packages that are missing.

The one place that leaves a test out: with the name of what is missing, and not where somebody
counts on every test (``CI`` is set, or ``PYVMM_REQUIRE_KVM=1``); there the test fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: Debian's packages, by the program that a test starts. Not here: what the build needs, and what
#: the smallest Debian has (the shell, coreutils, util-linux, dpkg).
PACKAGES = {
    "git": "git",
    "iasl": "acpica-tools",
    "ip": "iproute2",
    "losetup": "mount",
    "passt": "passt",
    "ping": "iputils-ping",
    "qemu-system-x86_64": "qemu-system-x86",
    "strace": "strace",
}
#: Seconds to wait before what the network failed is tried again, beside apt's own few tries.
PAUSES_S = (2, 10)
#: One list that is not to be had is an error, as all would be: without it packages are not found.
#: Another apt-get that is running is waited for.
OPTIONS = ("-q", "-o", "APT::Update::Error-Mode=any", "-o", "DPkg::Lock::Timeout=120")
#: File systems that keep files in memory (linux/magic.h).
IN_MEMORY = {0x01021994, 0x858458F6}


def demanded():
    """Whether a test that cannot run has failed."""
    return bool(os.environ.get("CI")) or os.environ.get("PYVMM_REQUIRE_KVM") == "1"


def missing(what):
    """End this test, which cannot run for want of ``what``."""
    import pytest

    if demanded():
        pytest.fail(f"{what}; CI or PYVMM_REQUIRE_KVM=1 demands it", pytrace=False)
    pytest.skip(what)


def another_host(why):
    """End this test, which the processor, the KVM or the memory of this host cannot show anything
    in; others can."""
    import pytest

    pytest.skip(f"{why}: a host of another kind shows it")


def history(problem):
    """End this test, which takes an earlier version that this clone does not have: a shallow one
    never does, whatever the machine; any other should."""
    import pytest

    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(command, capture_output=True, text=True, check=False).stdout == "true\n":
        pytest.skip(problem)
    missing(problem)


def device(path):
    """See that a device can be opened."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        missing(f"{path}: {error.strerror}")


def program(name):
    """The path of a program out of :data:`PACKAGES`."""
    found = shutil.which(name)
    if found is None:
        missing(f"{name} is not installed; as root: apt-get install {PACKAGES[name]}")
    return found


def root(purpose):
    """See that the tests run as root, which ``purpose`` takes."""
    if os.geteuid():
        missing(f"not root: {purpose}")


def memory_group(name, limit):
    """Make a control group of a name for processes with at most ``limit`` bytes of memory, beyond
    which the kernel kills one; its folder, which the caller removes."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    # Of the second version only where the controller is handed down.
    unified = v2 / "cgroup.subtree_control"
    if (v1 / "memory.limit_in_bytes").exists():
        group, files = v1 / name, ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    elif unified.exists() and "memory" in unified.read_text().split():
        group, files = v2 / name, ("memory.max", "memory.swap.max")
    else:
        another_host("no memory control groups")
    try:
        group.mkdir()
        (group / files[0]).write_text(str(limit))
        if (group / files[1]).exists():
            (group / files[1]).write_text(str(limit) if "memsw" in files[1] else "0")
    except OSError as error:
        another_host(f"no memory control group can be made here ({error.strerror})")
    return group


def collapse():
    """See that the kernel makes huge pages of memory on request, Linux 6.1."""
    from pyvmm.memory.backend import HUGE_PAGE, RamBackend
    from pyvmm.memory.config import RamConfig

    memory = RamBackend(RamConfig("memory-backend-memfd", "probe", HUGE_PAGE, prealloc=True))
    try:
        memory._madvise(25)
    except OSError as error:
        another_host(f"no huge pages on request ({error.strerror})")
    finally:
        memory.close()


def disk(folder):
    """See that a folder is on a disk: files in memory need no flush and take any alignment."""
    if in_memory(folder):
        missing(f"{folder} is in memory; name a folder on a disk with TMPDIR")


def in_memory(folder):
    """Whether files in this folder are nowhere else."""
    from pyvmm._native import lib

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return lib.pyvmm_fs_type(fd) in IN_MEMORY
    finally:
        os.close(fd)


def take_disk_for_temporary_files():
    """Have temporary files on a disk, where there is one; /tmp is in memory since Debian 13."""
    if in_memory(tempfile.gettempdir()) and not in_memory("/var/tmp"):
        os.environ["TMPDIR"] = tempfile.tempdir = "/var/tmp"


def lacking():
    """The packages whose programs are missing."""
    return [package for name, package in PACKAGES.items() if not shutil.which(name)]


def may_install():
    """Whether Debian's packages can be installed."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install(packages):
    """Install what is to be had of these packages; return what apt-get said if that is not all."""
    fresh = apt_get("update")
    command = ("install", "-y", "--no-install-recommends")
    # Without a network there is still apt's cache, but nothing to wait for.
    done = apt_get(*command, *packages, pauses=() if fresh.returncode else None)
    if done.returncode and not network_failed(done.stderr):
        for package in packages:
            apt_get(*command, package)
    return done.stderr if done.returncode else ""


def apt_get(command, *arguments, cwd=None, pauses=None):
    """Run apt-get; if the network failed it, again after each of ``pauses``, :data:`PAUSES_S`.

    :return: the finished process, with its output as text
    """
    words = ["apt-get", command, *OPTIONS, *arguments]
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    for pause in (*(PAUSES_S if pauses is None else pauses), None):
        done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
        if not done.returncode or pause is None or not network_failed(done.stderr):
            return done
        print(f"apt-get {command}: no answer, once more in {pause} s", file=sys.stderr)
        time.sleep(pause)
    raise AssertionError


def network_failed(errors):
    """Whether apt-get's error text tells of something that may pass; an old list does not."""
    return any(
        line.startswith("E: Failed to fetch") and " 404 " not in line
        for line in errors.splitlines()
    )


def main():
    """Install what the tests need, or say what to install; they do without it, or say so."""
    packages = lacking()
    if packages and may_install():
        print(f"installing {' '.join(packages)}", flush=True)
        print(install(packages), end="", file=sys.stderr)
        packages = lacking()
    if packages:
        names = " ".join(packages)
        print(f"tests need more; as root: apt-get install {names}", file=sys.stderr)


if __name__ == "__main__":
    main()
