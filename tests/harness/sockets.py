"""Socket chardevs and their clients."""

from pyvmm.chardev.address import TcpAddress, UnixAddress
from pyvmm.chardev.base import OPENED
from pyvmm.chardev.socket import SocketChardev


def server(image, path="s", **options):
    address = UnixAddress(path, "-chardev")
    return image.make(SocketChardev, address=address, server=True, **options)


def tcp_server(image, port=0, **options):
    address = TcpAddress("127.0.0.1", port, "-chardev")
    return image.make(SocketChardev, address=address, server=True, **options)


def connected(image, clients, recorder, room=None):
    """A server with a client and a front end."""
    chardev = server(image)
    frontend = recorder(room)
    chardev.attach(frontend)
    client = clients()
    image.until(lambda: frontend.events == [OPENED])
    return chardev, frontend, client
