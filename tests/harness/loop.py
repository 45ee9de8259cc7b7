"""A block device whose blocks are those of a file; root only."""

import contextlib
import subprocess

from harness import needs


@contextlib.contextmanager
def loop_device(path):
    """Path of a device for the file, for as long as it is needed."""
    needs.root("loop devices")
    made = subprocess.run(
        [needs.program("losetup"), "--show", "-f", path],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        needs.missing(f"loop devices: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
