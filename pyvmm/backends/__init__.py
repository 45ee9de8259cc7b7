"""The host side of devices: disk images, taps, sockets. It knows nothing of guests."""
