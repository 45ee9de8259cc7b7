"""What the outer machine has in its own memory of the host's files: those that Python reads.

Each file that is opened over 9p costs several messages to QEMU and back, a Python program opens
hundreds, and an update starts two of them.
"""

import sys
from pathlib import Path

import pyvmm

#: Where the files are in the initramfs.
FOLDER = "fast"


def files():
    """Content for :func:`nested.image.cpio`: pyvmm, and what this process runs on: another one,
    inside, needs much the same.

    The time of a source comes along, which tells Python whether its byte code is current.
    """
    wanted = {Path(sys.executable), *_mapped(), *_imported()}
    wanted.update(path for path in Path(pyvmm.__file__).parent.rglob("*") if path.is_file())
    found = {}
    for path in wanted:
        for link in _links(path):
            found[_name(link)] = link
        found[_name(path.resolve())] = path.resolve()
    return found


def _imported():
    """Sources and byte code of the modules that are loaded."""
    for module in list(sys.modules.values()):
        for path in (getattr(module, "__file__", None), getattr(module, "__cached__", None)):
            if path and Path(path).is_file():
                yield Path(path)


def _mapped():
    """Programs, libraries and extension modules."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.is_absolute() and path.is_file():
            yield path


def _links(path):
    """Symbolic links on the way to a file."""
    while True:
        link = next((part for part in [*reversed(path.parents), path] if part.is_symlink()), None)
        if link is None:
            return
        yield link
        path = link.parent / link.readlink() / path.relative_to(link)


def _name(path):
    return f"{FOLDER}{path}"
