"""Inputs that reached something: those of the working copy in a folder, and those that are kept in
an archive for each target."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from fuzz import one

KEPT = Path(__file__).with_name("corpus")


def read(name):
    """The inputs that are kept of a target, by name."""
    path = KEPT / f"{name}.tar.xz"
    if not path.exists():
        return {}
    with tarfile.open(path) as archive:
        return {each.name: archive.extractfile(each).read() for each in archive}


def prepare(name, build, seeds):
    """Put what a run begins with into the folder of its inputs; that folder."""
    folder = build / name / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    for data in (*seeds, *read(name).values()):
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return folder


def keep(name, build, extension):
    """Put the fewest inputs that reach all that was reached into the archive; how many."""
    folder = build / name / "inputs"
    merged = build / name / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    subprocess.run(
        one.command(name, extension, "-merge=1", str(merged), str(folder)),
        check=True,
        capture_output=True,
    )
    inputs = sorted(merged.iterdir())
    KEPT.mkdir(exist_ok=True)
    with tarfile.open(KEPT / f"{name}.tar.xz", "w:xz") as archive:
        for each in inputs:
            entry = tarfile.TarInfo(each.name)  # the same inputs give the same archive
            entry.size = each.stat().st_size
            archive.addfile(entry, io.BytesIO(each.read_bytes()))
    return len(inputs)
