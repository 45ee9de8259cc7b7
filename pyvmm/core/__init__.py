"""Machine fabric: event loop, buses, interrupt lines, run states. Knows no device and no KVM."""
