"""Images of a VMM that tests pretend to exec, for the fixtures called ``images``."""

import os
import time

from harness.process import descriptors
from pyvmm.core.eventloop import EventLoop
from pyvmm.cpr.handover import Handover

DEADLINE_S = 20


class BareImage:
    """One image of a VMM: a loop, a hand-over, and what is made on them."""

    def __init__(self, inherited=None, states=None):
        self.loop = EventLoop()
        self.handover = Handover(inherited, states)
        self._made = []

    def until(self, condition):
        """Run the loop until ``condition()``."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, "it never happened"
            self.loop.run_once(0.2)

    def settle(self):
        """Run the loop until it has nothing to do at once."""
        for _ in range(5):
            self.loop.run_once(0)

    def exec(self):
        """What the next image inherits; this one is gone without having closed anything.

        Only the descriptors that are kept go over, and only the duplicates are left open, so
        that peers see what they would see.
        """
        kept = self.handover.kept()
        inherited = {key: os.dup(fd) for key, fd in kept.items()}
        self.abandon()
        for fd in kept.values():
            self.loop.remove(fd)
            os.close(fd)
        self.loop.close()
        self._made.clear()
        self.handover = self.loop = None
        return inherited

    def abandon(self):
        """Have Python objects leave the descriptors that are kept alone."""


def making(kind):
    """Give a maker of images: the first, or with what an exec left over, the next. In the end
    all are closed, and no descriptor is left."""
    made = []

    def make(inherited=None, states=None):
        made.append(kind(inherited, states))
        return made[-1]

    before = descriptors("self")
    yield make
    for image in made:
        image.close()
    assert descriptors("self") == before, "descriptors leaked"
