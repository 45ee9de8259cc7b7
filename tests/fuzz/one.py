"""One target: in a process of its own, with the fuzzer around it and the sanitized extension in the
place of the package's.

    python -m fuzz.one TARGET EXTENSION [libFuzzer's options and folders]
"""

import ctypes
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

#: Which module has a target.
TARGETS = {
    "state": "readers",
    "handover": "readers",
    "qmp": "readers",
    "hmp": "readers",
    "serial": "devices",
    "rings": "devices",
    "virtio": "devices",
}
NO_RANDOMIZATION = 0x0040000  # personality(2)
LIMITS = ("-max_len=4096", "-timeout=60", "-rss_limit_mb=2560", "-print_final_stats=1")


def names():
    """All targets."""
    return list(TARGETS)


def find(name):
    """A target, and inputs to begin with."""
    module = importlib.import_module(f"fuzz.{TARGETS[name]}")
    return module.TARGETS[name]


def command(name, extension, *arguments):
    """What runs a target; the fuzzer's options and folders follow."""
    return [sys.executable, "-m", "fuzz.one", name, str(extension), *arguments]


def summary(text):
    """What a run that found nothing has done, from its output."""
    runs = re.findall(r"Done (\d+) runs", text)
    last = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    coverage, _, kept = last[-1] if last else ("?", "?", "?")
    return f"{runs[-1] if runs else '?'} inputs, coverage {coverage}, {kept} kept"


def reason(text):
    """The lines of its output that say what is wrong: of the exception, or of the sanitizer."""
    lines = text.splitlines()
    for mark in ("Uncaught Python exception", "ERROR: ", "runtime error: "):
        for at, line in enumerate(lines):
            if mark in line:
                return "\n".join("  " + each for each in lines[at : at + 30])
    return "\n".join("  " + each for each in lines[-10:])


def _load_extension(path):
    """Have the package import this extension."""
    name = "pyvmm._native._kvm"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def main():
    """Fuzz one target; never returns."""
    runtime = str(Path(importlib.util.find_spec("atheris").origin).parents[1])
    runtime += "/asan_with_fuzzer.so"
    if os.environ.get("LD_PRELOAD") != runtime:
        # The runtime's shadow memory may lie where a kernel's generous randomization puts things.
        ctypes.CDLL(None).personality(NO_RANDOMIZATION)
        os.environ["LD_PRELOAD"] = runtime
        os.environ["ASAN_OPTIONS"] = "detect_leaks=0:quarantine_size_mb=32:handle_segv=1"
        os.execv(sys.executable, command(*sys.argv[1:]))
    del os.environ["LD_PRELOAD"]
    name, extension, *arguments = sys.argv[1:]
    _load_extension(extension)
    import atheris

    with atheris.instrument_imports(include=["pyvmm"]):
        target, _ = find(name)
    # As the fuzzer calls itself when it merges: by a shell.
    again = " ".join(map(shlex.quote, command(name, extension)))
    atheris.Setup([again, *LIMITS, *arguments], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
