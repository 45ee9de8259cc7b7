"""A virtio device that answers each request with what it read, for tests of transports."""

from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.vmstate.fields import Description, u32

MAC = bytes(range(1, 7))


class Echo(VirtioDevice):
    """Answers each request on either of two queues with what it read; notes what happens."""

    virtio_id = 42
    name = "virtio-echo-device"
    queue_sizes = (8, 4)
    features = 1 << 5 | 1 << 35
    config = MAC
    vmstate = Description("virtio-echo", [u32("served")])

    def __init__(self, loop):
        super().__init__(loop)
        self.served = 0
        self.acts = []
        self.written = {}

    def handle_chain(self, queue, chain):
        self.served += 1
        queue.push(chain.head, chain.write(chain.read(4096)))

    def write_config(self, offset, data):
        self.written[offset] = data

    def on_activate(self):
        self.acts.append("activate")

    def reset(self):
        assert not self.active
        self.acts.append("reset")

    def drain(self, timeout_s=None):
        self.acts.append("drain")

    def start(self):
        self.acts.append("start")

    def close(self):
        self.acts.append("close")


def ask(driver, text, queue=0):
    """Send a request and run the device; the answer."""
    request = driver.queues[queue].add([text], [64])
    driver.queues[queue].kick()
    driver.run()
    assert [reaped for reaped, _ in driver.queues[queue].reap()] == [request]
    return request.data(len(text))
