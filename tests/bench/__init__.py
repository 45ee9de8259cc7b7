"""What ``make bench`` runs: measurements of pyvmm on this host, beside QEMU or another version."""
