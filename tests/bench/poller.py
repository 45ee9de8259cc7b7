"""Watches a counter that the guest keeps in shared RAM, from a process of its own.

The guest increments the counter without end, so a time without a change is a time without the
guest. The process looks some ten thousand times a second instead of spinning: on a small host
it must not compete with the VMM that it measures. The error of a gap is two such periods.

As a program: ``poller.py PATH OFFSET`` prints a line once the counter moves, and on SIGINT the
gaps as JSON. Times are CLOCK_MONOTONIC in ns, so they can be set against other processes'.
"""

import gc
import json
import mmap
import os
import signal
import subprocess
import sys
import time

PERIOD_S = 20e-6  # plus the kernel's timer slack of 50 us
THRESHOLD_NS = 200_000  # shorter gaps are the polling itself


def watch(path, offset):
    """Poll until SIGINT; [start, end] of each gap."""
    fd = os.open(path, os.O_RDONLY)
    page = mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=offset)
    counter = memoryview(page).cast("Q")
    clock, sleep = time.monotonic_ns, time.sleep
    gaps = []
    gc.disable()
    try:
        last = counter[0]
        while counter[0] == last:
            sleep(PERIOD_S)
        print("moving", flush=True)
        changed = clock()
        while True:
            value = counter[0]
            now = clock()
            if value != last:
                if now - changed > THRESHOLD_NS:
                    gaps.append((changed, now))
                last, changed = value, now
            sleep(PERIOD_S)
    except KeyboardInterrupt:
        gaps.append((changed, clock()))
    return gaps


def longest(gaps, start, end):
    """Length in ms of the longest gap that overlaps the time from ``start`` to ``end``; the
    polling's resolution if there is none."""
    lengths = [until - since for since, until in gaps if since < end and until > start]
    return max(lengths, default=THRESHOLD_NS) / 1e6


class Poller:
    """A polling process, from when the counter moves; ``stop()`` gives the gaps.

    :param path: file to map, such as /proc/PID/fd/N
    :param offset: of the counter in it, a multiple of the page size
    """

    def __init__(self, path, offset):
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, path, str(offset)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        if self._process.stdout.readline() != b"moving\n":
            raise RuntimeError(f"the counter in {path} cannot be watched")

    def stop(self):
        """End the process; its gaps."""
        self._process.send_signal(signal.SIGINT)
        output, _ = self._process.communicate(timeout=10)
        return json.loads(output)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


if __name__ == "__main__":
    print(json.dumps(watch(sys.argv[1], int(sys.argv[2]))))
