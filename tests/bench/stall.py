"""How long a guest's devices do not answer in an update, seen from outside: by the time between two
bytes of its serial port, two completions of its disk, two answers to the host's frames.

The guest does nothing else meanwhile, one request after the other, as a program does that waits
for each of them.
"""

import os
import tempfile
import threading
import time
from pathlib import Path

from harness.stream import Peer

from bench import network
from bench.chain import REST_S, update
from bench.machines import COUNTER, MIB, Vmm
from bench.report import Result, progress
from bench.watcher import Watched, Watcher, longest

LIMIT_MS = 40.0
LEAST_NS = 500_000  # what is shorter is a request as ever, on this side a thread of Python
DISK = 64 * MIB
ANSWER_S = 0.5


def bench_stall(plan):
    """For each device the longest time without an answer, update by update."""
    yield from _rows("serial port", *_serial(plan))
    yield from _rows("disk, depth 1", *_disk(plan))
    if os.geteuid():
        yield Result("stall network", [], "ms", note="left out: needs root, for a namespace")
        return
    with network.tap():
        yield from _rows("network", *_network(plan))


def _rows(name, watched, updates):
    stalls, floors = [], []
    for start, end in updates:
        before = start - min(end - start, REST_S * 1e9)
        stalls.append(longest(watched.standing(start, end)))
        floors.append(longest(watched.standing(before, start)))
    floor = "the longest in as long a time without an update"
    return [
        Result(f"stall {name}", stalls, "ms", LIMIT_MS, "between two answers, the longest"),
        Result(f"  floor {name}", floors, "ms", note=floor),
    ]


def _serial(plan):
    with (
        tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder,
        Peer(Path(folder), "con") as peer,
    ):
        options = ("-chardev", peer.option, "-serial", "chardev:con")
        with Vmm(*options, folder=folder, serial=False, append="serial") as vm:
            stream = peer.stream
            stream.settimeout(ANSWER_S)
            with Arrivals(lambda: stream.recv(65536)) as arrivals:
                return arrivals.watched, _updates("serial port", vm, plan)


def _disk(plan):
    with tempfile.NamedTemporaryFile(prefix="pyvmm-bench-", dir="/dev/shm") as image:
        image.write(os.urandom(DISK))
        image.flush()
        options = [
            *("-drive", f"file={image.name},format=raw,if=none,id=disk"),
            *("-device", "virtio-blk-device,drive=disk"),
        ]
        append = "virtio-blk bench=read depth=1 ms=1000000000"
        with Vmm(*options, append=append) as vm:
            vm.expect("disk '")
            with Watcher(vm.memfd(), COUNTER, LEAST_NS) as watcher:
                updates = _updates("disk", vm, plan)
                return watcher.stop(), updates


def _network(plan):
    append = f"virtio-net buffer={network.BUFFER} step=1000000"
    with Vmm(*network.DEVICE, append=append) as vm, network.packets() as packets:
        vm.expect("virtio-net ready")
        packets.settimeout(ANSWER_S)
        frame = network.frame(60)

        def ask():
            packets.send(frame)
            return packets.recv(2048)

        with Arrivals(ask) as arrivals:
            return arrivals.watched, _updates("network", vm, plan)


def _updates(name, vm, plan):
    updates = []
    for number in range(plan.runs):
        progress(f"stall {name}: update {number + 1} of {plan.runs}")
        time.sleep(REST_S)
        updates.append(update(vm, plan))
    time.sleep(REST_S)
    return updates


class Arrivals:
    """Notes the gaps between what arrives, in a thread of its own.

    :param receive: waits for it; TimeoutError if it must be asked for again
    :ivar watched: what is to be looked at once this is closed
    """

    def __init__(self, receive):
        self._receive = receive
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.watched = Watched([], [])

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def _work(self):
        gaps, clock = self.watched.gaps, time.monotonic_ns
        last = clock()
        while not self._stopped.is_set():
            try:
                if not self._receive():
                    break  # whoever sends it has ended
            except TimeoutError:
                continue
            now = clock()
            if now - last > LEAST_NS:
                gaps.append((last, now, 0))
            last = now
        gaps.append((last, clock(), 0))
