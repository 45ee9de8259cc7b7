"""Names files that are given as kernels and are none that can be loaded, for the error.

By their magic numbers, with what to do about it. Imported only when a file is refused. The file
is hostile: each read is capped, and what is not there is not named.
"""

from __future__ import annotations

import struct

from pyvmm.boot import flat, multiboot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.blob import Blob
    from pyvmm.boot.elf import Elf
    from pyvmm.errors import ConfigError

_UNPACK = "unpack it first ({})"
_DISK = "boot it from firmware elsewhere, or give its kernel here and the image with -drive"
_ARCHIVE = "give the kernel that is in it"
_ARM = "give a kernel for x86-64"

#: (offset, magic, what has it there, what to do)
_MAGICS = (
    (0, b"\x1f\x8b", "a file compressed with gzip", _UNPACK.format("gzip -d")),
    (0, b"BZh", "a file compressed with bzip2", _UNPACK.format("bzip2 -d")),
    (0, b"\xfd7zXZ\0", "a file compressed with xz", _UNPACK.format("xz -d")),
    (0, b"\x5d\0\0", "a file compressed with lzma", _UNPACK.format("xz -d --format=lzma")),
    (0, b"\x28\xb5\x2f\xfd", "a file compressed with zstd", _UNPACK.format("zstd -d")),
    (0, b"\x04\x22\x4d\x18", "a file compressed with lz4", _UNPACK.format("lz4 -d")),
    (0, b"\x02\x21\x4c\x18", "a file compressed with lz4", _UNPACK.format("lz4 -d")),
    (0, b"\x89LZO\0", "a file compressed with lzop", _UNPACK.format("lzop -d")),
    (0, b"070701", "a cpio archive", "it may be an initial RAM disk, for -initrd"),
    (0, b"070702", "a cpio archive", "it may be an initial RAM disk, for -initrd"),
    (0, b"PK\x03\x04", "a zip archive", _ARCHIVE),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _ARCHIVE),
    (0, b"!<arch>\n", "an ar archive (a Debian package or a library)", _ARCHIVE),
    (0, b"\xed\xab\xee\xdb", "an RPM package", _ARCHIVE),
    (257, b"ustar", "a tar archive", _ARCHIVE),
    (0, b"\x27\x05\x19\x56", "a U-Boot image (uImage)", "give the kernel that is in it"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or a FIT image", "give the kernel that is in it"),
    (0, b"ANDROID!", "an Android boot image", "give the kernel that is in it (unpack_bootimg)"),
    (0, b"VNDRBOOT", "an Android boot image", "give the kernel that is in it (unpack_bootimg)"),
    (0, b"QFI\xfb", "a qcow2 disk image", _DISK),
    (0, b"KDMV", "a VMDK disk image", _DISK),
    (0, b"vhdxfile", "a VHDX disk image", _DISK),
    (0, b"conectix", "a VHD disk image", _DISK),
    (0x8001, b"CD001", "an ISO 9660 image", _DISK),
    (512, b"EFI PART", "a disk image (GPT)", _DISK),
    (0, b"hsqs", "a squashfs file system", _DISK),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system", _DISK),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system", _DISK),
    (0, b"XFSB", "an XFS file system", _DISK),
    (0x1_0040, b"_BHRfS_M", "a btrfs file system", _DISK),
    (0x38, b"ARMd", "Linux for 64-bit Arm", _ARM),
    (0x38, b"RSC\x05", "Linux for RISC-V", _ARM),
    (4, b"zimg", "a compressed EFI program (Linux's EFI_ZBOOT)", _ARM),
    (0, b"\xca\xfe\xba\xbe", "a Mach-O or Java program", _ARM),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O program", _ARM),
    (0, b"#!", "a script", "give a kernel"),
)  # fmt: skip
_HEAD = max(offset + len(magic) for offset, magic, _, _ in _MAGICS)

#: What the kinds of ``-machine kernel-type`` demand.
_LACKS = {
    "linux": "neither a bzImage nor an ELF file of 64 bits",
    "pvh": "not an ELF file with a PVH note",
    "multiboot": "without a multiboot header",
}

_SECTIONS_MAX = 96  # as Windows has it
_EFI_SUBSYSTEMS = range(10, 14)
_PE_MACHINES = {0x14C: "32-bit x86", 0x8664: "x86-64", 0xAA64: "64-bit Arm", 0x5064: "RISC-V"}


def error(blob: Blob, executable: Elf | None, wanted: str) -> ConfigError:
    """Return the error for *blob*, which is of no kind that is loaded.

    :param executable: the blob, if it is ELF
    :param wanted: one of ``config.TYPES``: what it was to be
    """
    if wanted != "auto":
        return blob.error(
            f"{_LACKS[wanted]}, which kernel-type={wanted} demands; leave kernel-type away"
        )
    return blob.error(_elf(blob, executable) if executable else _other(blob))


def _elf(blob: Blob, executable: Elf) -> str:
    if multiboot.is_version_2(blob):
        return (
            "a multiboot 2 kernel, which is not supported; give it a PVH note or a multiboot 1"
            " header too"
        )
    if executable.has_interpreter:
        return "a program (ELF with an interpreter), not a kernel; give a kernel"
    if not executable.is_64:
        return "32-bit ELF with neither a PVH note nor a multiboot header; give such a kernel"
    return (
        "64-bit ELF without a PVH note, without a multiboot header, and it does not look like"
        " Linux; give such a kernel, or say -machine kernel-type=linux to have it entered as Linux"
    )


def _other(blob: Blob) -> str:
    head = blob.head(_HEAD)
    for offset, magic, what, mend in _MAGICS:
        if head.startswith(magic, offset):
            return f"{what}, not a kernel; {mend}"
    if multiboot.is_version_2(blob):
        return "a multiboot 2 kernel, which is not supported; give one with a multiboot 1 header"
    found = _efi(blob, head) or _plain(head)
    if found:
        return found
    if len(head) < 0x206 and head[0x1FE:0x200] == b"\x55\xaa":
        return "a bzImage that ends within its setup header; it is truncated"
    mend = "give one of these"
    if blob.size <= flat.SIZE_MAX:
        mend += (
            ", or say -machine kernel-type=flat if it is a flat real-mode image without a boot"
            " sector's signature (0x55 0xaa at 510)"
        )
    return (
        f"{blob.size} bytes of no kind that is known: neither a bzImage, nor ELF, nor multiboot;"
        f" {mend}"
    )


def _plain(head: bytes) -> str:
    """Return what a file without a magic number is, and the mend; empty if it does not show."""
    start = head[:512]
    if not any(head):
        return "a file of zeros; build or copy the kernel again"
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        return "a page of HTML, not a kernel; download the kernel again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not a kernel; fetch the file (git lfs pull)"
    # The cut may have gone through a character.
    text = start.decode("utf-8", "replace").rstrip("\ufffd")
    if text and all(one.isprintable() or one.isspace() for one in text) and "\ufffd" not in text:
        return "a text file, not a kernel; give a kernel"
    return ""


def _efi(blob: Blob, head: bytes) -> str:
    """Return what kind of EFI or DOS program it is, and the mend; empty if it is none (PE format,
    "COFF File Header" on)."""
    if not head.startswith(b"MZ") or len(head) < 0x40:
        return ""
    (at,) = struct.unpack_from("<I", head, 0x3C)
    if at + 24 + 70 > blob.size or blob.read(at, 4) != b"PE\0\0":
        return "a DOS program, not a kernel; give a kernel"
    machine, count = struct.unpack("<HH", blob.read(at + 4, 4))
    (optional,) = struct.unpack("<H", blob.read(at + 20, 2))
    (subsystem,) = struct.unpack("<H", blob.read(at + 24 + 68, 2))
    what = "an EFI program" if subsystem in _EFI_SUBSYSTEMS else "a Windows program"
    what = f"{what} for {_PE_MACHINES.get(machine, f'machine {machine:#x}')}, {blob.size} bytes"
    table = at + 24 + optional
    size = min(count, _SECTIONS_MAX) * 40
    data = blob.read(table, size) if table + size <= blob.size else b""
    names = {data[start : start + 8].rstrip(b"\0") for start in range(0, len(data), 40)}
    if b".linux" in names:
        also = ", and likewise .initrd for -initrd" if b".initrd" in names else ""
        return (
            f"{what} (a unified kernel image), and there is no EFI here; give the kernel that is in"
            f" it (objcopy -O binary -j .linux FILE KERNEL{also})"
        )
    return f"{what}, and there is no EFI here; give a kernel"
