"""A file system with little room, for guest memory that the host cannot back."""

import os
import subprocess

from harness import needs

PAGE = 4096


class Tmpfs:
    """A tmpfs of its own at ``path``, with a file ``filler`` that takes the room away.

    The test is left out where nothing may be mounted.
    """

    def __init__(self, path, size):
        self.path = path
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            needs.missing(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
        self._filler = os.open(path / "filler", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)

    @property
    def free_pages(self):
        """How many pages it still has room for."""
        return os.statvfs(self.path).f_bfree

    def fill(self, leave=0):
        """Take all the room but ``leave`` pages."""
        size = os.fstat(self._filler).st_size
        # A few pages are counted on each processor before they are counted at all.
        while (pages := self.free_pages - leave) > 0:
            try:
                os.posix_fallocate(self._filler, size, pages * PAGE)
            except OSError:
                os.posix_fallocate(self._filler, size, PAGE)
            size = os.fstat(self._filler).st_size

    def free(self, pages=None):
        """Give room back; without a number all of it."""
        size = os.fstat(self._filler).st_size
        os.ftruncate(self._filler, 0 if pages is None else max(size - pages * PAGE, 0))

    def close(self):
        os.close(self._filler)
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


def memory(path, size="64M", **more):
    """Options: guest RAM in a file at ``path``."""
    keys = "".join(f",{key}={value}" for key, value in more.items())
    return ["-object", f"memory-backend-file,id=ram0,size={size},mem-path={path},share=on{keys}"]
