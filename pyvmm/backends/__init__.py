"""The host side of disks and networks: files, taps, sockets."""
