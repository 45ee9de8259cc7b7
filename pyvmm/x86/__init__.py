"""What is particular to x86: the memory layout, start registers, CPU and irqchip state."""
