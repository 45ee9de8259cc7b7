"""/dev/kvm: capabilities, what CPUs can be offered (KVM API, section 4).

The descriptor works in any process, so a live update hands it to the new image, which then
needs no permission to open the device again.
"""

from __future__ import annotations

import errno
import os

from pyvmm._native import ffi, ioctl, ioctl_value, lib
from pyvmm.errors import HostError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

API_VERSION = 12
MAX_CPUID_ENTRIES = 256

#: What the machine cannot do without, and the first Linux release that has it.
REQUIRED = {
    "KVM_CAP_IRQCHIP": "2.6.20",
    "KVM_CAP_USER_MEMORY": "2.6.25",
    "KVM_CAP_SET_TSS_ADDR": "2.6.24",
    "KVM_CAP_EXT_CPUID": "2.6.25",
    "KVM_CAP_MP_STATE": "2.6.27",
    "KVM_CAP_IOEVENTFD": "2.6.32",
    "KVM_CAP_PIT2": "2.6.31",
    "KVM_CAP_PIT_STATE2": "2.6.32",
    "KVM_CAP_VCPU_EVENTS": "2.6.33",
    "KVM_CAP_DEBUGREGS": "2.6.35",
    "KVM_CAP_XSAVE": "2.6.36",
    "KVM_CAP_XCRS": "2.6.36",
    "KVM_CAP_IMMEDIATE_EXIT": "4.13",
}


class System:
    """The system descriptor.

    :param fd: an open /dev/kvm, owned from now on
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._msr_indices: list[int] | None = None

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> System:
        """Open the device, see that it can do what is needed, and return it.

        :raises HostError: saying what is missing and how to mend it
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(_explain(path, error)) from None
        try:
            system = cls(fd)
            system.check(path)
        except BaseException:
            os.close(fd)
            raise
        return system

    def check(self, path: str) -> None:
        """See that this is KVM and has :data:`REQUIRED`.

        :raises HostError: with what is missing
        """
        try:
            version = self.get_api_version()
        except KvmError:
            raise HostError(f"{path} is not a KVM device") from None
        if version != API_VERSION:
            raise HostError(f"{path} has KVM API version {version}, not {API_VERSION}")
        for name, release in REQUIRED.items():
            if not self.check_extension(name):
                raise HostError(f"{path} lacks {name}, which Linux has since {release}")

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: return the version, 12 in every Linux since 2.6.22."""
        return ioctl_value(self.fd, "KVM_GET_API_VERSION")

    def check_extension(self, name: str) -> int:
        """KVM_CHECK_EXTENSION: return 0 if the capability ``name`` is absent, else its value."""
        return ioctl_value(self.fd, "KVM_CHECK_EXTENSION", getattr(lib, name), name)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: return the bytes of a vCPU's kvm_run mapping."""
        return ioctl_value(self.fd, "KVM_GET_VCPU_MMAP_SIZE")

    def get_supported_cpuid(self) -> Any:
        """KVM_GET_SUPPORTED_CPUID: return a ``struct kvm_cpuid2`` with what this host can offer."""
        cpuid = ffi.new("struct kvm_cpuid2 *", {"entries": MAX_CPUID_ENTRIES})
        # How much room there is; KVM puts the number of entries there, or fails with E2BIG.
        cpuid.nent = MAX_CPUID_ENTRIES
        ioctl(self.fd, "KVM_GET_SUPPORTED_CPUID", cpuid)
        return cpuid

    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: return the MSRs that are part of a vCPU's state."""
        # KVM refuses a list that is too short, and writes into it how long it must be.
        count = ffi.new("struct kvm_msr_list *", {"indices": 0})
        try:
            ioctl(self.fd, "KVM_GET_MSR_INDEX_LIST", count)
        except KvmError as error:
            if error.errno != errno.E2BIG:
                raise
        found = ffi.new("struct kvm_msr_list *", {"indices": count.nmsrs})
        found.nmsrs = count.nmsrs
        ioctl(self.fd, "KVM_GET_MSR_INDEX_LIST", found)
        return [found.indices[i] for i in range(found.nmsrs)]

    @property
    def msr_indices(self) -> list[int]:
        """:meth:`get_msr_index_list`, which KVM is asked for once."""
        if self._msr_indices is None:
            self._msr_indices = self.get_msr_index_list()
        return self._msr_indices

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _explain(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"{path} does not exist: load kvm_intel or kvm_amd, or turn virtualization on"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"No permission to open {path}: add the user to group kvm and log in again, or "
            f"run 'setfacl -m u:$USER:rw {path}' as root"
        )
    return f"Cannot open {path}: {error.strerror}"
