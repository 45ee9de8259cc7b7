"""Watches a counter that the guest keeps in shared RAM, from a process of its own.

The guest increments the counter without end, so a time without a change is a time without the
guest. The process looks every 50 us and sleeps in between, without the 50 us that the kernel may
add (its timer slack): on a small host one that spins takes a processor from the VMM that it
measures, and this one takes an eighth. Its own delays cost no precision: of the time between two
looks that is taken off for which the counter went on, at the speed that it had.

As a program: ``watcher.py PATH OFFSET LEAST_NS`` prints a line once the counter moves, and on
SIGINT what it saw as JSON. Times are CLOCK_MONOTONIC in ns, so they can be set against other
processes'.
"""

import bisect
import contextlib
import ctypes
import gc
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise

PERIOD_S = 50e-6
LEAST_NS = 100_000  # shorter gaps are the looking itself
PRECISE_NS = 20_000  # a value and its time are at most so far apart
NOTE_NS = 1_000_000  # how often the counter's value is noted
PR_SET_TIMERSLACK = 29


def watch(path, offset, least_ns):
    """Look until SIGINT; gaps and notes of :class:`Watched`."""
    # A shell that starts something in the background has it ignore that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    with contextlib.suppress(PermissionError):
        # What it has to wait for it does not see: looks are short.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    fd = os.open(path, os.O_RDONLY)
    page = mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=offset)
    counter = memoryview(page).cast("Q")
    clock, sleep = time.monotonic_ns, time.sleep
    gaps, notes = [], []
    gc.disable()
    try:
        last = counter[0]
        while counter[0] == last:
            sleep(PERIOD_S)
        print("moving", flush=True)
        last, changed = counter[0], clock()
        noted = changed
        while True:
            before = clock()
            value = counter[0]
            now = clock()
            if now - before > PRECISE_NS:
                continue  # not of one moment: this process had to wait in between
            if value != last:
                if now - changed > least_ns:
                    gaps.append((changed, now, value - last))
                last, changed = value, now
            if now >= noted:
                notes.append((now, value))
                noted = now + NOTE_NS
            sleep(PERIOD_S)
    except KeyboardInterrupt:
        gaps.append((changed, clock(), 0))
    return gaps, notes


class Watched:
    """What was seen of a counter.

    :param gaps: (start, end, increments in it) of each time without a change; the last one ends
        with the watching
    :param notes: (time, value) all along, some thousand a second
    """

    def __init__(self, gaps, notes):
        self.gaps = gaps
        self.notes = notes
        self._times = [at for at, _ in notes]

    @property
    def moves(self):
        """Whether the counter moved until the end."""
        start, end, _ = self.gaps[-1]
        return end - start < 100 * LEAST_NS

    def speed(self, start, end):
        """Increments per ns in that time: the median between neighbouring notes."""
        first = bisect.bisect_left(self._times, start)
        notes = self.notes[first : bisect.bisect_right(self._times, end)]
        speeds = [
            (value - before) / (until - since)
            for (since, before), (until, value) in pairwise(notes)
        ]
        return statistics.median(speeds) if speeds else 0.0

    def standing(self, start, end, speed=0.0, least_ns=LEAST_NS):
        """Lengths in ms of the gaps that overlap that time, without what the counter went on in
        them at that speed (increments per ns; 0: they are as long as they look)."""
        lengths = [
            until - since - (count / speed if speed else 0)
            for since, until, count in self.gaps
            if since < end and until > start
        ]
        return [length / 1e6 for length in lengths if length >= least_ns]

    def back_at(self, start, speed, window_ns):
        """When, from ``start`` on, the counter has begun to go at that :meth:`speed` for so long;
        None if it never did."""
        for since in self._times[bisect.bisect_left(self._times, start) :]:
            if since + window_ns > self._times[-1]:
                return None
            if self.speed(since, since + window_ns) >= speed:
                return since
        return None


def longest(lengths):
    """The longest gap in ms; what is seen at the least if there is none."""
    return max(lengths, default=LEAST_NS / 1e6)


class Watcher:
    """A watching process, from when the counter moves.

    :param path: file to map, such as /proc/PID/fd/N
    :param offset: of the counter in it, a multiple of the page size
    :param least_ns: gaps that are shorter are not noted
    """

    def __init__(self, path, offset, least_ns=LEAST_NS):
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, path, str(offset), str(least_ns)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        if self._process.stdout.readline() != b"moving\n":
            raise RuntimeError(f"the counter in {path} cannot be watched")

    def stop(self):
        """End the process; what it :class:`Watched`."""
        self._process.send_signal(signal.SIGINT)
        output, _ = self._process.communicate(timeout=60)
        return Watched(*json.loads(output))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


if __name__ == "__main__":
    print(json.dumps(watch(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
