"""How device state is described, written to and read from QEMU's migration stream format."""
