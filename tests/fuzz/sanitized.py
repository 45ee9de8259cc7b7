"""The extension with AddressSanitizer and UBSan in it, for a process that has their runtime."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import harness

FLAGS = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
SOURCES = Path("pyvmm/_native")
PROGRAM = Path(harness.__file__).with_name("build_extension.py")


def build(folder):
    """Build it, if that is necessary, in a copy of its sources below ``folder``; its path."""
    copy = folder / "source"
    extension = copy / SOURCES / "_kvm.abi3.so"
    sources = [each for each in SOURCES.iterdir() if each.suffix in (".c", ".h", ".cdef", ".py")]
    sources = [each for each in sources if each.name != "_kvm.c"]
    newest = max(each.stat().st_mtime for each in sources)
    if not extension.exists() or extension.stat().st_mtime < newest:
        print("building the native code with sanitizers", flush=True)
        shutil.rmtree(copy, ignore_errors=True)
        (copy / SOURCES).mkdir(parents=True)
        shutil.copy("pyproject.toml", copy)
        for each in sources:
            shutil.copy(each, copy / each)
        environment = {**os.environ, "EXTRA_CFLAGS": FLAGS}
        done = subprocess.run(
            [sys.executable, PROGRAM.resolve()],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"fuzz: the native code was not built:\n{done.stderr}")
    return extension.resolve()
