"""PCI: the host bridge, functions with their configuration space, BARs and interrupts."""
