"""The host side of devices: image files, taps, sockets. It knows nothing of guests."""
