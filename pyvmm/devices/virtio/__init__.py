"""virtio 1.3 devices over virtio-mmio. Imported only by machines that have one."""
