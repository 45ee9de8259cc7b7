"""The KVM API: one class per kind of descriptor, one method per ioctl."""
