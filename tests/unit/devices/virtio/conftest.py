import pytest

from pyvmm.core.eventloop import EventLoop
from pyvmm.testing.virtio_driver import VirtioDriver


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def plug():
    """Puts a driver over a device."""
    made = []

    def plug(device, **options):
        made.append(VirtioDriver(device, **options))
        return made[-1]

    yield plug
    for driver in made:
        driver.close()
