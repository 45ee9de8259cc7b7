"""Guests of a few instructions, in the GNU assembler's words."""

import functools
import subprocess
import tempfile
from pathlib import Path


@functools.cache
def assemble(text, bits=16):
    """The machine code of some instructions (AT&T syntax; `;` ends one), for 16 or 64 bits."""
    with tempfile.TemporaryDirectory() as folder:
        listing, code = Path(folder, "code.o"), Path(folder, "code.bin")
        source = f".code{bits}\n{text}\n"
        subprocess.run(["as", "--64", "-o", listing, "-"], input=source, text=True, check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", listing, code], check=True)
        return code.read_bytes()
