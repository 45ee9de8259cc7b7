"""A virtio disk with a driver, for the tests of the block device."""

import struct
import time

from pyvmm.backends.block import BlockFile
from pyvmm.backends.block_config import BlockConfig
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover
from pyvmm.devices.virtio.blk import VirtioBlk
from pyvmm.machine.drivers import virtio_blk
from pyvmm.testing.virtio_driver import VirtioDriver

SIZE = 1 << 20


SECTORS = SIZE // 512


DEADLINE_S = 20


class Disk:
    """A device over an image, and a driver for it.

    :param image: attributes of the :class:`BlockConfig`
    :param properties: of the ``-device``
    """

    def __init__(self, path, image=None, features=None, **properties):
        self.loop = EventLoop()
        self.config = BlockConfig("disk", str(path))
        for key, value in (image or {}).items():
            setattr(self.config, key, value)
        self.file = BlockFile(self.config, Handover())
        self.properties = {"drive": "disk", **properties}
        self.errors = []
        self.driver = VirtioDriver(self.device())
        self.driver.start(features)

    def device(self):
        def on_error(operation, error, action):
            self.errors.append((operation, error.errno, action))

        values = virtio_blk.DRIVER.parse(self.properties, "-device").values
        return VirtioBlk(self.loop, self.file, virtio_blk.config(values), on_error)

    def ask(self, kind, sector=0, data=b"", room=0, *, split=(), indirect=False):
        """One request: its status and what was read. ``split``: lengths of the buffers."""
        header = struct.pack("<IIQ", kind, 0, sector)
        return self.raw([header, data] if data else [header], [room, 1] if room else [1], indirect)

    def raw(self, readable, writable, indirect=False):
        request = self.driver.queues[0].add(readable, writable, indirect=indirect)
        self.driver.queues[0].kick()
        ((done, written),) = self.wait(1)
        assert done is request
        assert written == sum(length for _, length in request.writable)
        data = request.data()
        return data[-1], data[:-1]

    def wait(self, count):
        """What the device returns, ``count`` requests of it."""
        found = []
        end = time.monotonic() + DEADLINE_S
        while len(found) < count:
            assert time.monotonic() < end, f"{len(found)} of {count} requests came back"
            self.driver.run(0.001)
            found += self.driver.queues[0].reap()
        return found

    def contents(self):
        with open(self.config.filename, "rb") as file:
            return file.read()

    def close(self):
        self.driver.close()
        self.file.close()
        self.loop.close()


def pattern(size, seed=1):
    return bytes((at * 7 + at // 512 * 13 + seed) & 0xFF for at in range(size))


def segment(sector, count, flags=0):
    return struct.pack("<QII", sector, count, flags)
