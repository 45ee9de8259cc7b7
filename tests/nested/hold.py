"""Keeps a VM with a vCPU for as long as the outer machine runs; returns when it is there.

The kernel rewrites instructions of its scheduler when the first VM comes and when the last one
goes, and KVM some of its own when the first local APIC comes that is disabled. QEMU sometimes goes
on to execute on another CPU what it translated meanwhile: the breakpoint that is there while
an instruction is being rewritten, for ever, with the scheduler's lock held. With this VM there
is never a first one nor a last one.
"""

import fcntl
import os
import signal

KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU = 0xAE01, 0xAE60, 0xAE41

reader, writer = os.pipe()
if os.fork():
    os.close(writer)
    raise SystemExit(os.read(reader, 1) != b"1")
vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_CREATE_VM, 0)
fcntl.ioctl(vm, KVM_CREATE_IRQCHIP, 0)
fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
os.write(writer, b"1")
while True:
    signal.pause()
