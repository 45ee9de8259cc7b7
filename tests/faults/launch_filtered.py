"""``launch_filtered.py SOCKET PROGRAM...``: executes PROGRAM under a seccomp filter.

The filter's listener goes to whoever listens on SOCKET (seccomp_unotify(2)).

The filter asks for nearly every system call, of the program and of all that it starts or is
replaced by; the listener says whether the kernel does it or it fails.
"""

import array
import ctypes
import os
import socket
import struct
import sys

SECCOMP = 317  # system call
SET_MODE_FILTER = 1
NEW_LISTENER = 1 << 3
WAIT_KILLABLE_RECV = 1 << 5  # a signal does not interrupt a call that waits for its answer
PR_SET_NO_NEW_PRIVS = 38
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF
ALLOW, ASK = 0x7FFF0000, 0x7FC00000
NUMBER, ARCH, SECOND_ARGUMENT = 0, 4, 24  # offsets in struct seccomp_data
X86_64 = 0xC000003E
IOCTL = 16
#: Not asked for either: the guest itself, some ten thousand times a second, and what the carrier
#: reads of it. A kick would interrupt a wait for an answer, and it interrupts no such call.
EXEMPT_IOCTLS = {
    "KVM_RUN": 0xAE80,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_GET_SREGS2": 0x8140AECC,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_GET_XSAVE2": 0x9000AECF,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_GET_DEVICE_ATTR": 0x4018AEE2,
    "KVM_GET_ONE_REG": 0x4010AEAB,
    "KVM_GET_PIT2": 0x8070AE9F,
    "KVM_GET_IRQCHIP": 0xC208AE62,
    "KVM_GET_CLOCK": 0x8030AE7C,
}

#: Not asked for: what hands the listener over, what glibc answers by abort (for what Python's locks
#: and threads are made of an error is a bug of the caller), and what cannot fail.
EXEMPT = {
    "sendmsg": 46,
    "futex": 202,
    "rt_sigreturn": 15,
    "exit": 60,
    "exit_group": 231,
    "restart_syscall": 219,
    "rseq": 334,
}


def filter_program():
    """The BPF program."""
    code = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, ALLOW)]
    code.append((LOAD, 0, 0, NUMBER))
    for number in EXEMPT.values():
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    code += [(EQUAL, 1, 0, IOCTL), (RETURN, 0, 0, ASK), (LOAD, 0, 0, SECOND_ARGUMENT)]
    for request in EXEMPT_IOCTLS.values():
        code += [(EQUAL, 0, 1, request), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ASK))
    return b"".join(struct.pack("HBBI", *line) for line in code), len(code)


def install():
    """Put the filter on this process; the listener's descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    code, length = filter_program()
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", length, ctypes.addressof(buffer))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    flags = NEW_LISTENER | WAIT_KILLABLE_RECV
    fd = libc.syscall(SECCOMP, SET_MODE_FILTER, flags, program)
    if fd < 0:
        sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
    return fd


with socket.socket(socket.AF_UNIX) as supervisor:
    supervisor.connect(sys.argv[1])
    message = array.array("i", [0])
    listener = message[0] = install()
    supervisor.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, message)])
os.close(listener)
os.execvp(sys.argv[2], sys.argv[2:])
