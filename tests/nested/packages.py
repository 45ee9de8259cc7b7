"""Debian packages that are used without being installed: fetched once, unpacked, cached."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from nested import image

OUTER_KERNEL = "linux-image-amd64"
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "unshare": "util-linux",
}


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

    if (lack := lacking()) and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ("apt-get", "install", "-q", "-y", "--no-install-recommends", *lack)
        _with_lists(lambda: _run(*install))
    if lack := lacking():
        raise MissingError(f"missing; as root: apt-get install {' '.join(lack)}")


def unpacked(package):
    """The folder with a package's files; fetched from the host's Debian mirror the first time.

    A package without files of its own (such as linux-image-amd64) stands for the first one that
    it depends on.

    :raises MissingError: if it is neither cached nor to be had
    """
    folder = cache() / package
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _with_lists(lambda: _download(_real_name(package), scratch))
        tree = Path(scratch, "tree")
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
    return unpacked("busybox-static") / "bin" / "busybox"


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
        _run("apt-get", "update", "-q")
        return action()


def _real_name(package):
    depends = _run("apt-cache", "depends", "--important", package)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    return found[1] if found else package


def _download(package, folder):
    # As root, apt would read as a user who may not enter the folder, and warn.
    _run("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package, cwd=folder)
    (archive,) = Path(folder).glob("*.deb")
    return archive


def _run(*command, cwd=None):
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise MissingError(f"missing: {error.filename}") from None
    if done.returncode:
        raise MissingError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout
