"""Debian packages that are used without being installed: fetched once, unpacked, cached."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from harness import needs

from nested import image

OUTER_KERNEL = "linux-image-amd64"
#: The kernels of Debian 12 and 13, whatever the host's release is.
KERNELS = {"6.1": "linux-image-amd64/bookworm", "6.12": "linux-image-amd64/trixie"}
CLOUD_KERNEL = "linux-image-cloud-amd64"
#: With the C library.
FIO = ("fio", "libc6")
FOR_GUESTS = (CLOUD_KERNEL, *FIO)
#: Older ones emulate SVM with more errors; 7.2 lets a guest set XCR0 behind KVM's back.
OLDEST_QEMU = (10, 0)
QEMU = "qemu-system-x86_64"
QEMU_PACKAGES = ("qemu-system-x86", "qemu-system-data", "seabios")
PROGRAMS = {
    QEMU: QEMU_PACKAGES[0],
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "unshare": "util-linux",
}
#: As root, apt would read as a user who may not enter the folder, and warn.
NO_SANDBOX = ("-o", "APT::Sandbox::User=root")


class MissingError(RuntimeError):
    """The host lacks something; says what to install."""


def cache():
    """The folder that holds what was unpacked."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pyvmm" / "nested"


def need_programs():
    """Install what the nested machine needs, where that is possible.

    :raises MissingError: if a program is missing
    """

    def lacking():
        return [package for program, package in PROGRAMS.items() if not shutil.which(program)]

    if (lack := lacking()) and needs.may_install():
        needs.install(lack)
    if lack := lacking():
        raise MissingError(f"missing; as root: apt-get install {' '.join(lack)}")


def fetch():
    """Fetch what guests are made of: in the nested machine there is no network.

    :raises MissingError: if something is not to be had
    """
    busybox()
    vmlinux()
    for package in FOR_GUESTS:
        unpacked(package)


def unpacked(package):
    """The folder with a package's files; fetched from the host's Debian mirror the first time.

    A package without files of its own (such as linux-image-amd64) stands for the first one that
    it depends on.

    :param package: its name, as apt writes it: NAME, or NAME/RELEASE for another release of Debian
    :raises MissingError: if it is neither cached nor to be had
    """
    name, _, release = package.partition("/")

    def download(folder):
        if not release:
            _download(folder, _real_name(name))
            return
        with _lists_of(release) as options:
            _download(folder, _real_name(name, *options), *options)

    return _unpacked(package.replace("/", "_"), download)


def qemu():
    """The words that start QEMU: the host's own, or if that is too old the one that Debian has made
    for older releases ("backports"), which needs no library that the host's own does not need.

    :raises MissingError: if neither is to be had
    """
    need_programs()
    version = re.search(r"version (\d+)\.(\d+)", _run(QEMU, "--version"))
    if version and tuple(map(int, version.groups())) >= OLDEST_QEMU:
        return [QEMU]
    tree = _unpacked("qemu", _download_newer_qemu) / "usr"
    command = [tree / "bin" / QEMU, "-L", tree / "share/qemu", "-L", tree / "share/seabios"]
    _run(*command, "--version")  # fails if a library is missing
    return command


def _download_newer_qemu(folder):
    suite = f"{_mirror()[1]}-backports"
    with _lists_of(suite) as options:
        _download(folder, *QEMU_PACKAGES, "-t", suite, *options)


def _mirror():
    """The address and the release of the host's Debian mirror."""
    wanted = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    found = _run("apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", *wanted)
    release = re.search(r"^(\S+) (\w+)$", found, re.M)
    if not release:
        raise MissingError("no Debian mirror is known: see apt's sources")
    return release.groups()


@contextlib.contextmanager
def _lists_of(suite):
    """Options with which apt knows the packages of a suite on the host's mirror, and no others, by
    lists that nothing else sees."""
    with tempfile.TemporaryDirectory() as scratch:
        sources, lists = Path(scratch, "sources.list"), Path(scratch, "lists")
        sources.write_text(f"deb {_mirror()[0]} {suite} main\n")
        lists.mkdir()
        options = [
            *("-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=/dev/null"),
            *("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={scratch}/cache"),
        ]
        _apt_get("update", *NO_SANDBOX, *options)
        yield options


def _unpacked(name, download):
    """The folder in the cache that has the files of all packages that ``download`` puts into the
    folder it is called with, if need be.
    """
    folder = cache() / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _with_lists(lambda: download(scratch))
        tree = Path(scratch, "tree")
        for archive in Path(scratch).glob("*.deb"):
            _run("dpkg-deb", "-x", archive, tree)
        try:
            tree.rename(folder)
        except OSError:
            # Another process was faster.
            if not folder.exists():
                raise
    return folder


def kernel(package=OUTER_KERNEL):
    """The bzImage of a kernel package."""
    (path,) = unpacked(package).glob("boot/vmlinuz-*")
    return path


def vmlinux(package=OUTER_KERNEL):
    """The ELF file in a kernel package's bzImage."""
    path = unpacked(package) / "boot" / "vmlinux"
    if not path.exists():
        _write(path, image.vmlinux(kernel(package).read_bytes()))
    return path


def busybox():
    """A static busybox."""
    (path,) = unpacked("busybox-static").glob("**/bin/busybox")
    return path


def _write(path, data):
    """So that nobody ever sees half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.rename(file.name, path)


def _with_lists(action):
    """Do what needs the lists of packages: a fresh container has none, an old one stale ones."""
    try:
        return action()
    except MissingError:
        if os.geteuid() != 0:
            raise
        _apt_get("update")
        return action()


def _real_name(package, *options):
    depends = _run("apt-cache", "depends", "--important", package, *options)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    return found[1] if found else package


def _download(folder, *packages_and_options):
    _apt_get("download", *NO_SANDBOX, *packages_and_options, cwd=folder)


def _apt_get(*arguments, cwd=None):
    return _output(lambda: needs.apt_get(*arguments, cwd=cwd))


def _run(*command):
    return _output(lambda: subprocess.run(command, capture_output=True, text=True))


def _output(run):
    try:
        done = run()
    except FileNotFoundError as error:
        raise MissingError(f"missing: {error.filename}") from None
    if done.returncode:
        raise MissingError(f"{' '.join(map(str, done.args))}: {done.stderr.strip()}")
    return done.stdout
