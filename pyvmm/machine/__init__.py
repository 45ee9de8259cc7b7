"""The machine: configuration, builder, vCPU threads. The only place where KVM meets devices."""
