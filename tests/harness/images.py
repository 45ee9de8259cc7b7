"""Images of a VMM that tests pretend to exec, for the fixtures called ``images``."""

import os


def making(kind):
    """Give a maker of images: the first, or with what an exec left over, the next. In the end
    all are closed, and no descriptor is left."""
    made = []

    def make(inherited=None):
        made.append(kind(inherited))
        return made[-1]

    before = set(os.listdir("/proc/self/fd"))
    yield make
    for image in made:
        image.close()
    assert set(os.listdir("/proc/self/fd")) == before, "descriptors leaked"
