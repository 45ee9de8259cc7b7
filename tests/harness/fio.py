"""Debian's fio for a guest's initramfs, with the C library alone.

It is linked with libraries for network storage and the like, which bring some hundred packages
along, and calls them only where an option wants that.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from nested import packages

FOLDER = "lib/x86_64-linux-gnu"
LOADER = "ld-linux-x86-64.so.2"
LIBC = (LOADER, "libc.so.6", "libm.so.6")


def files():
    """``/bin/fio`` and its libraries, for :func:`nested.image.cpio`."""
    program, libc = (packages.unpacked(package) for package in packages.FIO)
    program = program / "usr" / "bin" / "fio"
    missing = _missing(program)
    wanted = re.findall(r"\(NEEDED\).*\[(.*)\]", _readelf("--dynamic", program))
    found = {"bin/fio": program.read_bytes()} | {f"{FOLDER}/{name}": missing for name in wanted}
    for name in LIBC:
        (path,) = libc.glob(f"**/{FOLDER}/{name}")
        found[f"{FOLDER}/{name}"] = path.read_bytes()
    return found | {f"lib64/{LOADER}": found[f"{FOLDER}/{LOADER}"]}


def _missing(program):
    """A library with the functions that are not the C library's; a call is SIGILL."""
    source, versions = "", {}
    symbols = _readelf("--dyn-syms", program)
    for name, version in re.findall(r" GLOBAL DEFAULT +UND (\w+)(?:@(\S+))?", symbols):
        if not version.startswith("GLIBC_"):
            source += f".globl {name}\n.type {name}, @function\n{name}:\n"
            if version:
                versions.setdefault(version, []).append(f"{name};")
    with tempfile.TemporaryDirectory() as folder:
        script, library = Path(folder, "versions"), Path(folder, "library")
        nodes = [f"{version} {{ {' '.join(names)} }};\n" for version, names in versions.items()]
        script.write_text("".join(nodes))
        command = ["gcc", "-shared", "-nostdlib", f"-Wl,--version-script={script}"]
        subprocess.run(
            [*command, "-o", library, "-x", "assembler", "-"],
            input=f"{source}ud2\n",
            check=True,
            text=True,
        )
        return library.read_bytes()


def _readelf(what, path):
    command = ["readelf", "--wide", what, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
