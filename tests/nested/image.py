"""What the outer machine boots: a kernel unpacked from its bzImage, and an initramfs."""

import lzma
import os
import struct
from pathlib import Path

import zstandard

HERE = Path(__file__).parent
#: For the root on 9p, the command port, KVM, and the network devices that tests use.
MODULES = "virtio_pci 9pnet_virtio 9p overlay virtio_console kvm_amd tun".split()


def vmlinux(bzimage):
    """The ELF file inside a bzImage whose payload is packed with zstd or xz, as Debian's kernel
    for amd64 is since release 13 and was before.

    A machine that enters it directly does not spend seconds on unpacking it with emulated
    instructions. Boot protocol: Documentation/arch/x86/boot.rst, payload_offset.
    """
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # Behind the stream there are four more bytes, which tell its unpacked size.
    payload = bzimage[start : start + length]
    if payload.startswith(zstandard.FRAME_HEADER):
        return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)


def module_paths(tree):
    """Module files below ``tree``, by the names that the kernel has for them."""
    paths = [path for path in Path(tree).rglob("*.ko*") if path.suffix in (".ko", ".xz")]
    return {path.name.partition(".ko")[0].replace("-", "_"): path for path in paths}


def read_module(path):
    """A module, unpacked if it is packed, as Debian's are since release 13."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def modules(tree, wanted):
    """The contents of module files below ``tree``, each behind all that it depends on, by name;
    without those that are part of the kernel.
    """
    paths = module_paths(tree)
    lists = [path.read_text().split() for path in Path(tree).rglob("modules.builtin")]
    builtin = {Path(name).stem.replace("-", "_") for names in lists for name in names}
    ordered = {}

    def add(name):
        if name in ordered or name in builtin:
            return
        data = read_module(paths[name])
        start = data.index(b"\0depends=") + len(b"\0depends=")
        for dependency in data[start : data.index(b"\0", start)].decode().split(","):
            if dependency:
                add(dependency.replace("-", "_"))
        ordered[name] = data

    for name in wanted:
        add(name)
    return ordered


def cpio(files):
    """An initramfs (cpio "newc") of executable files and the folders above them.

    :param files: content by path without leading slash; None makes a folder, and a ``Path``
        stands for the file or symbolic link that is there, with its time
    """
    folders = {str(parent): None for path in files for parent in Path(path).parents}
    del folders["."]
    entries = dict(sorted(folders.items())) | files
    archive = bytearray()
    for inode, (path, data) in enumerate([*entries.items(), ("TRAILER!!!", b"")], 1):
        mode, mtime = 0o40755 if data is None else 0o100755, 0
        if isinstance(data, Path):
            mtime = int(data.lstat().st_mtime)
            if data.is_symlink():
                mode, data = 0o120777, os.fsencode(data.readlink())
            else:
                data = data.read_bytes()
        _add(archive, inode, path, mode, data or b"", mtime)
        if path == "dev":
            # The kernel opens it for the first process, before anything mounts devtmpfs.
            _add(archive, 1 << 20, "dev/console", 0o20600, b"", 0, device=(5, 1))
    return bytes(archive)


def _add(archive, inode, path, mode, data, mtime, device=(0, 0)):
    name = path.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(name), 0)
    archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    archive += bytes(-len(archive) % 4) + data
    archive += bytes(-len(archive) % 4)


def initramfs(tree, busybox, extra=()):
    """The outer machine's: its scripts, busybox and modules."""
    found = modules(tree, [*MODULES, *extra])
    files = dict.fromkeys(["dev", "proc", "sys", "layer"])
    files |= {
        "init": (HERE / "init.sh").read_bytes(),
        "agent.sh": (HERE / "agent.sh").read_bytes(),
        "hold.py": (HERE / "hold.py").read_bytes(),
        "bin/busybox": Path(busybox).read_bytes(),
        "modules/order": "".join(f"{name}\n" for name in found).encode(),
    }
    return cpio(files | {f"modules/{name}.ko": data for name, data in found.items()})
