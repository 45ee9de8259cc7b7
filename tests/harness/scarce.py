"""Memory of a virtio driver that the host cannot back for a while."""

import os


class Scarce:
    """All of the driver's memory from here on: what it allocates after this was made.

    :ivar errors: what the device told the machine of it
    """

    def __init__(self, driver):
        self.driver = driver
        self.start = driver.allocate(1, 4096)
        driver.allocate(4095, 1)
        self.fd = driver.backend.fd
        self.errors = []
        driver.memory.report = self.errors.append

    def take(self):
        """Let it be gone."""
        size = self.driver.backend.size - self.start
        self._content = os.pread(self.fd, size, self.start)
        os.ftruncate(self.fd, self.start)

    def give(self):
        """Let it be there again, as it was."""
        os.ftruncate(self.fd, self.driver.backend.size)
        os.pwrite(self.fd, self._content, self.start)

    def pause(self):
        """Do what the machine does when it hears of it."""
        assert self.errors
        assert "memory ram0" in str(self.errors[0])
        assert "has been cut" in str(self.errors[0])
        self.errors.clear()
        self.driver.transport.drain()

    def cont(self):
        """Let the guest go on."""
        self.driver.transport.start()
        self.driver.run()
