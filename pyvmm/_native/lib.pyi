"""What the compiled module has: the constants of linux.cdef and the functions of the headers.

Arguments and results are what cffi makes of C's: any integer is int, a pointer is what ffi.new and
the like return. tests/unit/test_native.py compares this with the module as it was built.
"""

from typing import TypeAlias

from cffi import FFI

_Pointer: TypeAlias = FFI.CData

# ---- kvm -------------------------------------------------------------------------------
def pyvmm_ioctl(fd: int, request: int, argument: _Pointer) -> int: ...
def pyvmm_ioctl_value(fd: int, request: int, argument: int) -> int: ...
def pyvmm_run(vcpu_fd: int, gate: _Pointer) -> int: ...
def pyvmm_install_kick(signum: int) -> int: ...
def pyvmm_map(fd: int, size: int) -> _Pointer: ...
def pyvmm_map_private(size: int) -> _Pointer: ...
def pyvmm_change(word: _Pointer, former: int, to: int) -> int: ...
def pyvmm_wake(word: _Pointer) -> None: ...
def pyvmm_unmap(address: _Pointer, size: int) -> int: ...

# ---- words -----------------------------------------------------------------------------
def pyvmm_add_word_functions(module: _Pointer) -> int: ...

# ---- answers ---------------------------------------------------------------------------
PYVMM_CONFIG_SIZE: int
PYVMM_OUTPUT_SIZE: int
PYVMM_FIFO_DEPTH: int
PYVMM_UART: int
PYVMM_DEBUGCON: int
PYVMM_VIRTIO_MMIO: int
PYVMM_PM_TIMER: int
PYVMM_NOBODY: int

def pyvmm_answer(answers: _Pointer, run: _Pointer) -> int: ...

# ---- host ------------------------------------------------------------------------------
def pyvmm_fallocate(fd: int, mode: int, offset: int, length: int) -> int: ...
def pyvmm_fs_type(fd: int) -> int: ...
def pyvmm_map_over(address: _Pointer, size: int, fd: int, is_shared: int) -> int: ...
def pyvmm_forget_page(page: _Pointer, size: int) -> int: ...
def pyvmm_name_thread(name: bytes) -> int: ...
def pyvmm_rdtsc() -> int: ...
def pyvmm_barrier() -> None: ...

# ---- holder ----------------------------------------------------------------------------
def pyvmm_hold_memory(keep_fds: _Pointer, count: int, release_fd: int) -> int: ...

# ---- state -----------------------------------------------------------------------------
PYVMM_MAX_MSRS: int
PYVMM_MAX_CPUID: int
PYVMM_CHIPS: int

def pyvmm_save_cpu(
    fd: int, state: _Pointer, xsave: _Pointer, has_xsave2: int, list: _Pointer, error: _Pointer
) -> int: ...
def pyvmm_load_cpu(
    fd: int, state: _Pointer, xsave: _Pointer, event_flags: int, error: _Pointer
) -> int: ...
def pyvmm_age_pit(pit: _Pointer) -> None: ...
def pyvmm_save_vm(fd: int, state: _Pointer, error: _Pointer) -> int: ...
def pyvmm_load_vm(fd: int, state: _Pointer, error: _Pointer) -> int: ...

# ---- carrier ---------------------------------------------------------------------------
PYVMM_CARRIER_VERSION: int
PYVMM_MAX_WRITES: int
PYVMM_MAX_PORT_DATA: int
PYVMM_EXIT_SIZE: int
PYVMM_STACK_SIZE: int
PYVMM_HOLD: int
PYVMM_RUN: int
PYVMM_TAKE: int
PYVMM_BACK: int
PYVMM_END: int
PYVMM_PREPARING: int
PYVMM_CROSSING: int
PYVMM_TAKEN: int
PYVMM_LATE: int
PYVMM_OLD: int
PYVMM_CARRIED: int
PYVMM_NEW: int
PYVMM_KEPT: int

def pyvmm_start_carrier(carrier: _Pointer) -> int: ...
def pyvmm_wait_ready(control: _Pointer, timeout_ns: int) -> int: ...
def pyvmm_command(control: _Pointer, command: int, kick_signal: int) -> int: ...

# ---- takeover --------------------------------------------------------------------------
def pyvmm_take_over(takeover: _Pointer) -> int: ...

# ---- trial -----------------------------------------------------------------------------
PYVMM_TRIAL_BEGUN: int
PYVMM_TRIAL_ENTERED: int
PYVMM_TRIAL_LEFT: int
PYVMM_TRIAL_DONE: int
PYVMM_TRIAL_STACK: int

def pyvmm_try(trial: _Pointer) -> int: ...
def pyvmm_wait_trial(trial: _Pointer, timeout_ns: int) -> int: ...

# ---- guard -----------------------------------------------------------------------------
def pyvmm_install_guard() -> int: ...

# ---- memory ----------------------------------------------------------------------------
def pyvmm_add_functions(module: _Pointer) -> int: ...

# ---- upkeep ----------------------------------------------------------------------------
def pyvmm_map_ahead(upkeep: _Pointer) -> int: ...
def pyvmm_collapse(upkeep: _Pointer) -> int: ...
def pyvmm_stop_upkeep(upkeep: _Pointer) -> None: ...

# ---- virtq -----------------------------------------------------------------------------
def pyvmm_spread(
    ring: _Pointer,
    last_avail: int,
    used_idx: int,
    frame: _Pointer,
    length: int,
    mergeable: int,
) -> int: ...
def pyvmm_receive(
    ring: _Pointer,
    last_avail: int,
    used_idx: int,
    fd: int,
    buffer: _Pointer,
    size: int,
    shortest: int,
    mergeable: int,
    plain: int,
    budget: int,
    least: int,
    received: _Pointer,
) -> None: ...
def pyvmm_send(
    ring: _Pointer,
    last_avail: int,
    used_idx: int,
    fd: int,
    shortest: int,
    longest: int,
    most: int,
) -> int: ...
def pyvmm_pour(
    ring: _Pointer,
    last_avail: int,
    used_idx: int,
    fd: int,
    budget: int,
    least: int,
    poured: _Pointer,
) -> None: ...
def pyvmm_serve(
    ring: _Pointer,
    last_avail: int,
    used_idx: int,
    disk: _Pointer,
    most: int,
) -> int: ...

# ---- system descriptor: /dev/kvm -------------------------------------------------------
KVM_GET_API_VERSION: int
KVM_CREATE_VM: int
KVM_CHECK_EXTENSION: int
KVM_GET_VCPU_MMAP_SIZE: int
KVM_GET_SUPPORTED_CPUID: int
KVM_GET_MSR_INDEX_LIST: int

KVM_CAP_IRQCHIP: int
KVM_CAP_HLT: int
KVM_CAP_USER_MEMORY: int
KVM_CAP_SET_TSS_ADDR: int
KVM_CAP_EXT_CPUID: int
KVM_CAP_NR_VCPUS: int
KVM_CAP_NR_MEMSLOTS: int
KVM_CAP_MP_STATE: int
KVM_CAP_PIT2: int
KVM_CAP_PIT_STATE2: int
KVM_CAP_SET_IDENTITY_MAP_ADDR: int
KVM_CAP_ADJUST_CLOCK: int
KVM_CAP_VCPU_EVENTS: int
KVM_CAP_DEBUGREGS: int
KVM_CAP_XSAVE: int
KVM_CAP_XCRS: int
KVM_CAP_TSC_CONTROL: int
KVM_CAP_GET_TSC_KHZ: int
KVM_CAP_MAX_VCPUS: int
KVM_CAP_IMMEDIATE_EXIT: int
KVM_CAP_IOEVENTFD: int
KVM_CAP_READONLY_MEM: int
KVM_CAP_XSAVE2: int
KVM_CAP_VCPU_ATTRIBUTES: int
KVM_CAP_TSC_DEADLINE_TIMER: int
KVM_CAP_X86_ROBUST_SINGLESTEP: int
KVM_CAP_ONE_REG: int
KVM_CAP_SREGS2: int
KVM_CAP_EXCEPTION_PAYLOAD: int
KVM_CAP_X86_TRIPLE_FAULT_EVENT: int

# ---- VM descriptor ---------------------------------------------------------------------
KVM_ENABLE_CAP: int
KVM_GET_STATS_FD: int
KVM_SET_USER_MEMORY_REGION: int
KVM_SET_TSS_ADDR: int
KVM_SET_IDENTITY_MAP_ADDR: int
KVM_CREATE_IRQCHIP: int
KVM_CREATE_PIT2: int
KVM_CREATE_VCPU: int
KVM_IRQ_LINE: int
KVM_SIGNAL_MSI: int
KVM_SET_GSI_ROUTING: int
KVM_IRQ_ROUTING_IRQCHIP: int
KVM_IRQ_ROUTING_MSI: int
KVM_IOEVENTFD: int
KVM_IRQFD: int
KVM_GET_IRQCHIP: int
KVM_SET_IRQCHIP: int
KVM_GET_PIT2: int
KVM_SET_PIT2: int
KVM_REINJECT_CONTROL: int
KVM_GET_CLOCK: int
KVM_SET_CLOCK: int

KVM_MEM_READONLY: int
KVM_IOEVENTFD_FLAG_DATAMATCH: int
KVM_IOEVENTFD_FLAG_DEASSIGN: int
KVM_IOEVENTFD_FLAG_PIO: int
KVM_IRQFD_FLAG_DEASSIGN: int
KVM_PIT_SPEAKER_DUMMY: int
KVM_IRQCHIP_PIC_MASTER: int
KVM_IRQCHIP_PIC_SLAVE: int
KVM_IRQCHIP_IOAPIC: int

# ---- vCPU descriptor -------------------------------------------------------------------
KVM_GET_REGS: int
KVM_SET_REGS: int
KVM_GET_SREGS: int
KVM_SET_SREGS: int
KVM_GET_SREGS2: int
KVM_SET_SREGS2: int
KVM_GET_ONE_REG: int
KVM_SET_ONE_REG: int
KVM_GET_MSRS: int
KVM_SET_MSRS: int
KVM_SET_CPUID2: int
KVM_GET_CPUID2: int
KVM_GET_LAPIC: int
KVM_SET_LAPIC: int
KVM_GET_MP_STATE: int
KVM_SET_MP_STATE: int
KVM_GET_VCPU_EVENTS: int
KVM_SET_VCPU_EVENTS: int
KVM_GET_DEBUGREGS: int
KVM_SET_DEBUGREGS: int
KVM_GET_XSAVE: int
KVM_GET_XSAVE2: int
KVM_SET_XSAVE: int
KVM_GET_XCRS: int
KVM_SET_XCRS: int
KVM_GET_TSC_KHZ: int
KVM_SET_TSC_KHZ: int
KVM_KVMCLOCK_CTRL: int
KVM_TRANSLATE: int
KVM_NMI: int
KVM_HAS_DEVICE_ATTR: int
KVM_GET_DEVICE_ATTR: int
KVM_SET_DEVICE_ATTR: int
KVM_VCPU_TSC_CTRL: int
KVM_VCPU_TSC_OFFSET: int

KVM_MP_STATE_RUNNABLE: int
KVM_MP_STATE_UNINITIALIZED: int
KVM_MP_STATE_INIT_RECEIVED: int
KVM_MP_STATE_HALTED: int
KVM_MP_STATE_SIPI_RECEIVED: int
KVM_VCPUEVENT_VALID_NMI_PENDING: int
KVM_VCPUEVENT_VALID_SIPI_VECTOR: int
KVM_VCPUEVENT_VALID_SHADOW: int
KVM_VCPUEVENT_VALID_SMM: int
KVM_VCPUEVENT_VALID_PAYLOAD: int
KVM_VCPUEVENT_VALID_TRIPLE_FAULT: int
KVM_X86_SHADOW_INT_MOV_SS: int
KVM_SREGS2_FLAGS_PDPTRS_VALID: int

KVM_EXIT_UNKNOWN: int
KVM_EXIT_EXCEPTION: int
KVM_EXIT_IO: int
KVM_EXIT_HYPERCALL: int
KVM_EXIT_DEBUG: int
KVM_EXIT_HLT: int
KVM_EXIT_MMIO: int
KVM_EXIT_IRQ_WINDOW_OPEN: int
KVM_EXIT_SHUTDOWN: int
KVM_EXIT_FAIL_ENTRY: int
KVM_EXIT_INTR: int
KVM_EXIT_INTERNAL_ERROR: int
KVM_EXIT_SYSTEM_EVENT: int
KVM_EXIT_IO_IN: int
KVM_EXIT_IO_OUT: int
KVM_SYSTEM_EVENT_SHUTDOWN: int
KVM_SYSTEM_EVENT_RESET: int
KVM_SYSTEM_EVENT_CRASH: int
KVM_INTERNAL_ERROR_EMULATION: int

# ---- files -----------------------------------------------------------------------------
FALLOC_FL_KEEP_SIZE: int
FALLOC_FL_PUNCH_HOLE: int
FALLOC_FL_ZERO_RANGE: int
