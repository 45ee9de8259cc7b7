"""Device models. They know an interrupt line, a byte stream and a bus; never KVM."""
