"""The build: C source of the extension, guest and firmware images, source archive.

setuptools runs these three command classes (named in pyproject.toml) for ``pip install`` and
``pip wheel``; nothing here is imported at run time.

The extension is one C file a subject, with a header that C and cffi read alike: what is for C
alone stands there under ``#ifndef FOR_CFFI``. What cffi has to know of the kernel's headers is in
``linux.cdef``. cffi makes ``_kvm.c`` of both. ``lib.pyi`` tells mypy what the module has.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import PlatformError

NATIVE = Path(__file__).parent
ROOT = NATIVE.parent.parent
#: Each is a C file and a header. cffi reads the headers in this order.
SUBJECTS = (
    "kvm",
    "words",
    "answers",
    "host",
    "holder",
    "state",
    "carrier",
    "takeover",
    "trial",
    "guard",
    "memory",
    "upkeep",
    "virtq",
)
#: Subjects that do without libc. The compiler must add no call of it and no canary to them, which
#: the flags that Python was built with ask for.
FREESTANDING = ("holder", "state", "carrier", "takeover", "trial")
FREESTANDING_FLAGS = (
    "-ffreestanding",
    # A call from one of them to another does not go through the dynamic linker.
    "-fvisibility=hidden",
    "-fno-stack-protector",
    "-fno-tree-loop-distribute-patterns",
    "-fno-sanitize=all",
)
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
    """Return what a build needs and this host lacks: a subset of the keys of ``PACKAGES``."""
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

    headers = "".join(f'#include "{name}.h"\n' for name in SUBJECTS)
    # -undef: names that compilers define of their own accord are not to be replaced.
    preprocess = ["gcc", "-E", "-P", "-undef", "-DFOR_CFFI", "-x", "c", "-"]
    declarations = subprocess.run(
        preprocess, cwd=NATIVE, input=headers, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    ffi = FFI()
    ffi.cdef((NATIVE / "linux.cdef").read_text())
    ffi.cdef(declarations)
    ffi.set_source("pyvmm._native._kvm", "#include <linux/falloc.h>\n" + headers)
    ffi.emit_c_code(str(NATIVE / "_kvm.c"))


class BuildExtension(build_ext):
    """``build_ext`` that has cffi write the source first, and compiles the subjects with it."""

    def run(self) -> None:
        """Compile the extension."""
        require_toolchain()
        emit_c()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link it; what is freestanding with flags of its own."""
        sources = {name: f"pyvmm/_native/{name}.c" for name in SUBJECTS}
        freestanding = self.compiler.compile(
            [sources.pop(name) for name in FREESTANDING],
            output_dir=self.build_temp,
            extra_postargs=[*ext.extra_compile_args, *FREESTANDING_FLAGS],
        )
        ext.sources = [*ext.sources, *sources.values()]
        ext.extra_objects = [*ext.extra_objects, *freestanding]
        super().build_extension(ext)


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
        sources = [f"pyvmm/_native/*.{suffix}" for suffix in ("c", "h", "cdef")]
        for pattern in (*sources, "Makefile", "*.md"):
            files.include(pattern)
        for folder in ("guests/build", "firmware/build"):
            files.prune(folder)
        for product in ("*.py[co]", "_kvm.c"):
            files.global_exclude(product)
        super().make_distribution()
