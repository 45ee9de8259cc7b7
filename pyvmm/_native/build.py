"""The build: C source of the extension, guest and firmware images, source archive.

setuptools runs these three command classes (named in pyproject.toml) for ``pip install`` and
``pip wheel``; nothing here is imported at run time. The extension's declarations are ``cdef*.h``
and its hand-written C is in ``SOURCES``; cffi makes ``_kvm.c`` of all of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import PlatformError

NATIVE = Path(__file__).parent
ROOT = NATIVE.parent.parent
#: In this order: the later ones use what is in the earlier ones.
SOURCES = ("guard.c", "shim.c")
#: What ships as pyvmm/data/: image -> folder whose make builds it under build/.
IMAGES = {"guest.elf": "guests", "bios.bin": "firmware"}

PACKAGES = {
    "gcc": "gcc",
    "ld": "binutils",
    "make": "make",
    "stdio.h": "libc6-dev",
    "linux/kvm.h": "linux-libc-dev",
    "Python.h": "python3-dev",
}


def missing() -> list[str]:
    """What a build needs and this host lacks: a subset of the keys of ``PACKAGES``."""
    include = f"-I{sysconfig.get_path('include')}"

    def found(name: str) -> bool:
        if not name.endswith(".h"):
            return shutil.which(name) is not None
        probe = ["gcc", include, "-E", "-x", "c", "-include", name, "/dev/null"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0

    absent = [name for name in PACKAGES if not name.endswith(".h") and not found(name)]
    if "gcc" in absent:
        return absent
    return absent + [name for name in PACKAGES if name.endswith(".h") and not found(name)]


def require_toolchain() -> None:
    """Stop the build with one line that says what to install."""
    if absent := missing():
        packages = " ".join(PACKAGES[name] for name in absent)
        raise PlatformError(f"cannot find {', '.join(absent)}: apt-get install {packages}")


def emit_c() -> None:
    """Write ``_kvm.c``, the cffi API-mode source of the module ``pyvmm._native._kvm``."""
    from cffi import FFI

    ffi = FFI()
    for fragment in sorted(NATIVE.glob("cdef*.h")):
        ffi.cdef(fragment.read_text())
    source = "\n".join((NATIVE / name).read_text() for name in SOURCES)
    ffi.set_source("pyvmm._native._kvm", source)
    ffi.emit_c_code(str(NATIVE / "_kvm.c"))


class BuildExtension(build_ext):
    """``build_ext`` that has cffi write the source first."""

    def run(self) -> None:
        """Compile the extension."""
        require_toolchain()
        emit_c()
        super().run()


class BuildPackage(build_py):
    """``build_py`` that adds the guest and firmware images to a package that is not editable.

    They go to the build folder only: a copy in the source tree would hide later builds of the
    images from a checkout, which takes them from where make leaves them.
    """

    def run(self) -> None:
        """Copy the modules; build and add the images."""
        super().run()
        if self.editable_mode:
            return
        require_toolchain()
        data = Path(self.build_lib, "pyvmm", "data")
        data.mkdir(parents=True, exist_ok=True)
        for image, folder in IMAGES.items():
            if subprocess.run(["make", "-s", "-C", str(ROOT / folder)], check=False).returncode:
                raise PlatformError(f"make -C {folder} failed: its messages are above")
            shutil.copyfile(ROOT / folder / "build" / image, data / image)


class SourceArchive(sdist):
    """``sdist`` with sources of extension, guests, firmware, tests and docs, without products."""

    def make_distribution(self) -> None:
        """Complete the file list and write the archive."""
        files = self.filelist
        for folder in ("docs", "guests", "firmware", "tests"):
            files.graft(folder)
        sources = [f"pyvmm/_native/{name}" for name in ("cdef*.h", *SOURCES)]
        for pattern in (*sources, "Makefile", "*.md"):
            files.include(pattern)
        for folder in ("guests/build", "firmware/build"):
            files.prune(folder)
        for product in ("*.py[co]", "_kvm.c"):
            files.global_exclude(product)
        super().make_distribution()
