import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._native import ffi
from pyvmm.errors import ConfigError
from pyvmm.machine import options, shape
from pyvmm.x86 import cpu_features, cpuid
from pyvmm.x86.cpuid import Topology

INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)  # EBX, ECX, EDX of leaf 0
AMD = (0x68747541, 0x444D4163, 0x69746E65)
XSAVE, AVX, AES, FMA, X2APIC = 1 << 26, 1 << 28, 1 << 25, 1 << 12, 1 << 21
FPU, MMX, SSE2 = 1 << 0, 1 << 23, 1 << 26
AVX2, AVX512F, AVX512VL, SMAP = 1 << 5, 1 << 16, 1 << 31, 1 << 20


class Host:
    """A host whose KVM offers the given leaves: (leaf, subleaf) -> EAX, EBX, ECX, EDX."""

    def __init__(self, vendor=INTEL, last=0x1F, **changes):
        self.leaves = {
            (0x0, 0): (last, *vendor),
            (0x1, 0): (0x806C1, 0x5A_10_0800, XSAVE | AVX | AES | FMA | X2APIC, FPU | MMX | SSE2),
            (0x4, 0): (0xFC00_4121, 0x2C0003F, 63, 0),
            (0x4, 1): (0xFC00_4143, 0x4C0003F, 1023, 0),
            (0x4, 2): (0xFC01_C163, 0x2C0003F, 0x5FFF, 4),
            (0x4, 3): (0, 0, 0, 0),
            (0x7, 0): (1, AVX2 | AVX512F | AVX512VL | SMAP, 0, 0),
            (0xB, 0): (1, 2, 0x100, 0x5A),
            (0xB, 1): (7, 16, 0x201, 0x5A),
            (0xD, 0): (0b11100111, 0x340, 2688, 0),
            (0xD, 1): (0xF, 0x988, 0, 0),
            (0xD, 2): (256, 576, 0, 0),
            (0xD, 5): (64, 1088, 0, 0),
            (0xD, 6): (512, 1152, 0, 0),
            (0xD, 7): (1024, 1664, 0, 0),
            (0x1F, 0): (1, 2, 0x100, 0x5A),
            (0x40000000, 0): (0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
            (0x40000001, 0): (0x01007EFB, 0, 0, 0),
            (0x80000001, 0): (0, 0, 0x121, 0x2C100800),
            (0x80000008, 0): (0x3030, 0x1000, 0x5A5A, 0),
            **changes,
        }
        if vendor == AMD:
            self.leaves |= {
                (0x80000001, 0): (0, 0, 0x121, 0x2C100800 | FPU | MMX),
                (0x8000001D, 0): (0x121, 0x1C0003F, 63, 0),
                (0x8000001D, 3): (0x1C163, 0x3C0003F, 0x3FFF, 1),
                (0x8000001E, 0): (0x5A, 0x5A, 0x5A, 0),
            }

    def get_supported_cpuid(self):
        found = ffi.new("struct kvm_cpuid2 *", {"entries": 256})
        for entry, ((function, index), registers) in zip(
            found.entries, self.leaves.items(), strict=False
        ):
            entry.function, entry.index = function, index
            entry.eax, entry.ebx, entry.ecx, entry.edx = registers
        found.nent = len(self.leaves)
        return found

    def check_extension(self, name):
        return name == "KVM_CAP_TSC_DEADLINE_TIMER"


def shown(host, topology=None, index=0, changes=(), tsc_khz=0):
    """What vCPU ``index`` is shown: (leaf, subleaf) -> registers."""
    topology = topology or Topology(1, 1, 1)
    found = cpuid.host_cpuid(host, topology, dict(changes), tsc_khz)
    cpuid.identity(found, topology)(index)
    entries = [found.entries[i] for i in range(found.nent)]
    leaves = {
        (each.function, each.index): (each.eax, each.ebx, each.ecx, each.edx) for each in entries
    }
    assert len(leaves) == len(entries)
    return leaves


def test_plain():
    host = Host()
    leaves = shown(host)
    assert leaves[1, 0][2] == host.leaves[1, 0][2] | 1 << 31 | 1 << 24
    assert leaves[1, 0][1] == 0x00_01_0800
    same = [key for key in host.leaves if key[0] not in (1, 4, 0xB, 0x1F)]
    assert {key: leaves[key] for key in same} == {key: host.leaves[key] for key in same}
    for leaf in (0xB, 0x1F):
        levels = [leaves[leaf, level] for level in range(3)]
        assert levels == [(0, 1, 0x100, 0), (0, 1, 0x201, 0), (0, 0, 2, 0)]


def test_levels_have_significant_indexes():
    found = cpuid.host_cpuid(Host(), Topology(1, 2, 1), {})
    flags = {each.flags for each in (found.entries[i] for i in range(found.nent))
             if each.function in (0xB, 0x1F)}  # fmt: skip
    assert flags == {1}


def test_leaves_beyond_the_last_are_not_made():
    assert not [leaf for leaf, _ in shown(Host(last=0xD)) if leaf == 0x1F]
    assert not [leaf for leaf, _ in shown(Host(last=0x7)) if leaf in (0xB, 0x1F)]


def test_topology_of_intel():
    topology = Topology(2, 4, 2)
    leaves = shown(Host(), topology, 13)
    assert leaves[1, 0][1] == 13 << 24 | 8 << 16 | 0x0800
    assert leaves[1, 0][3] & 1 << 28
    for leaf in (0xB, 0x1F):
        assert leaves[leaf, 0] == (1, 2, 0x100, 13)
        assert leaves[leaf, 1] == (3, 8, 0x201, 13)
        assert leaves[leaf, 2][:2] == (0, 0)
    # Cores less one, CPUs that share the cache less one.
    caches = [(leaves[4, i][0] >> 26, leaves[4, i][0] >> 14 & 0xFFF) for i in range(4)]
    assert caches == [(3, 1), (3, 1), (3, 7), (0, 0)]
    assert leaves[4, 2][0] & 0x3FFF == 0x163
    assert leaves[0x80000008, 0] == (0x3030, 0x1000, 0x5A5A, 0)


def test_topology_of_amd():
    leaves = shown(Host(AMD), Topology(2, 4, 2), 13)
    assert leaves[0x8000001E, 0] == (13, 0x0102, 0x0101, 0)
    assert leaves[0x80000008, 0][2] == 3 << 12 | 7
    assert leaves[0x80000001, 0][2] & 2
    assert [leaves[0x8000001D, i][0] >> 14 for i in (0, 3)] == [1, 7]
    assert not shown(Host(AMD))[0x80000001, 0][2] & 2


@given(st.integers(1, 255))
def test_one_socket_of_cores_gives_every_cpu_its_place(count):
    topology = Topology(1, count, 1)
    found = cpuid.host_cpuid(Host(AMD), topology, {})
    for index in {0, count // 2, count - 1}:
        cpuid.identity(found, topology)(index)
        entry = next(each for each in (found.entries[i] for i in range(found.nent))
                     if each.function == 0x8000001E)  # fmt: skip
        assert (entry.eax, entry.ebx & 0xFF, entry.ecx) == (index, index, 0)
    assert count <= 1 << topology.socket_shift < 2 * count + (count == 1)


def test_tsc_frequency():
    leaves = shown(Host(), tsc_khz=2_500_000)
    assert leaves[0x40000000, 0] == (0x40000010, *Host().leaves[0x40000000, 0][1:])
    assert leaves[0x40000010, 0] == (2_500_000, 1_000_000, 0, 0)


def test_features_are_taken_away():
    leaves = shown(Host(), changes={"aes": False, "smap": False, "kvmclock": False})
    assert not leaves[1, 0][2] & AES
    assert leaves[1, 0][2] & (AVX | X2APIC) == AVX | X2APIC
    assert leaves[7, 0][1] == AVX2 | AVX512F | AVX512VL
    assert leaves[0x40000001, 0][0] == 0x01007EFB & ~(1 << 0 | 1 << 3)


def test_wanted_features_are_there_already():
    assert shown(Host(), changes={"aes": True, "avx2": True}) == shown(Host())
    leaves = shown(Host(), changes={"kvm-hint-dedicated": True})
    assert leaves[0x40000001, 0][3] == 1


def test_features_that_kvm_does_not_offer():
    with pytest.raises(ConfigError, match="-cpu: monitor, sha-ni cannot be had"):
        shown(Host(), changes={"monitor": True, "aes": True, "sha-ni": True, "vmx": False})
    with pytest.raises(ConfigError, match="invtsc"):
        shown(Host(), changes={"invtsc": True})  # no such leaf


def test_what_depends_on_a_feature_goes_with_it():
    leaves = shown(Host(), changes={"avx": False})
    assert not leaves[1, 0][2] & (AVX | FMA)
    assert leaves[7, 0][1] == SMAP
    assert leaves[0xD, 0][0] == 0b11
    assert leaves[0xD, 0][2] == 576
    assert [index for leaf, index in leaves if leaf == 0xD] == [0, 1]


def test_components_of_xsave_shrink():
    leaves = shown(Host(), changes={"avx512f": False})
    assert leaves[7, 0][1] == SMAP | AVX2
    assert (leaves[0xD, 0][0], leaves[0xD, 0][2]) == (0b111, 832)


def test_no_xsave():
    leaves = shown(Host(), changes={"xsave": False})
    assert 0xD not in [leaf for leaf, _ in leaves]
    assert not leaves[1, 0][2] & (XSAVE | AVX | FMA)


def test_amd_says_some_twice():
    leaves = shown(Host(AMD), changes={"mmx": False})
    assert leaves[1, 0][3] & (MMX | FPU) == FPU
    assert leaves[0x80000001, 0][3] & (MMX | FPU) == FPU
    assert leaves[0x80000001, 0][3] & 0x2C100800 == 0x2C100800


def test_groups():
    leaves = shown(Host(), changes={"kvm": False, "pmu": False}, tsc_khz=1)
    assert not [leaf for leaf, _ in leaves if leaf >> 16 == 0x4000 or leaf == 0xA]
    assert leaves[1, 0][2] & 1 << 31


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("host", {}),
        ("max,+aes", {"aes": True}),
        ("host,-x2apic,aes=off,sse4_2,kvm=off", {"aes": False, "kvm": False, "sse4.2": True,
                                                 "x2apic": False}),
        ("host,sse3=yes,+pni,enforce", {"pni": True}),
        ("host,+tsc_deadline,-kvm_pv_eoi", {"kvm-pv-eoi": False, "tsc-deadline": True}),
    ],
)  # fmt: skip
def test_option(text, changes):
    config = options.parse(["-cpu", text])
    assert config.cpu_changes == changes
    words = [("+" if on else "-") + name for name, on in sorted(changes.items())]
    assert shape.describe(config)["-cpu"] == ",".join(["host", *words])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("486,+aes", "'486' is no CPU; give host or max"),
        ("host,+x2apc", "'x2apc' is no CPU feature; did you mean x2apic\\?"),
        ("host,frobnicate=on", "'frobnicate' is no CPU feature"),
        ("host,", "'' is no CPU feature"),
        ("host,-", "'' is no CPU feature"),
        ("host,--", "'-' is no CPU feature"),
        ("host,aes=maybe", "aes='maybe' is neither on nor off"),
        ("host,+aes,aes=off", "aes is wanted and not"),
        ("host,+fpu\0", "'fpu.x00' is no CPU feature"),
    ],
)
def test_bad_option(text, message):
    with pytest.raises(ConfigError, match=f"^-cpu: {message}"):
        options.parse(["-cpu", text])


@given(st.text(max_size=60))
def test_any_text_is_features_or_an_error(text):
    try:
        changes = cpu_features.parse(f"host,{text}", "-cpu")
    except ConfigError:
        return
    assert all(any(cpu_features.find(name)) or name in cpu_features.GROUPS for name in changes)


@pytest.mark.parametrize(
    ("text", "topology", "shown"),
    [
        ("4", (1, 4, 1), "4"),
        ("cpus=3", (1, 3, 1), "3"),
        ("4,sockets=2", (2, 2, 1), "4,sockets=2,cores=2,threads=1"),
        ("8,threads=2", (1, 4, 2), "8,sockets=1,cores=4,threads=2"),
        ("8,cores=2", (4, 2, 1), "8,sockets=4,cores=2,threads=1"),
        ("sockets=2,cores=4,threads=2", (2, 4, 2), "16,sockets=2,cores=4,threads=2"),
        ("threads=3", (1, 1, 3), "3,sockets=1,cores=1,threads=3"),
        ("cores=6,maxcpus=6", (1, 6, 1), "6"),
    ],
)
def test_smp(text, topology, shown):
    config = options.parse(["-smp", text])
    found = config.topology
    assert (found.sockets, found.cores, found.threads) == topology
    assert config.smp == found.count
    assert shape.describe(config)["-smp"] == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5,sockets=2", "sockets x cores x threads is 4, not cpus=5"),
        ("sockets=16,cores=16", "is 256, not cpus=255"),
        ("6,sockets=2", "cores=3 is no power of two; choose one"),
        ("6,threads=3", "threads=3 is no power of two"),
    ],
)
def test_bad_smp(text, message):
    with pytest.raises(ConfigError, match=f"^-smp: .*{message}"):
        options.parse(["-smp", text])


# ---- what no state has room for ----------------------------------------------------------------

SHSTK, IBT = 1 << 7, 1 << 20
XSAVES_HOST = {
    (0x7, 0): (2, AVX2, SHSTK | 1 << 3, IBT | 1 << 22 | 1 << 24 | 1 << 25),
    (0x7, 1): (1 << 21 | 1 << 4, 0, 0, 1 << 8),
    (0xD, 0): (0b111 | 1 << 9, 0x340, 2696, 0),
    (0xD, 1): (0x1F, 0x988, 1 << 11 | 1 << 12, 0),
    (0xD, 2): (256, 576, 0, 0),
    (0xD, 9): (8, 2688, 0, 0),
    (0xD, 11): (16, 0, 1, 0),
    (0xD, 12): (24, 0, 1, 0),
    (0x1D, 0): (1, 0, 0, 0),
    (0x1E, 0): (1, 0x4010, 0, 0),
}


class NewHost(Host):
    """One with CET, and with AMX, for which nobody has asked the permission."""

    msr_indices = (0x10, 0x6A0, 0x6A2)

    def __init__(self, leaves=(), lacking=(), msr_indices=msr_indices):
        super().__init__()
        self.leaves |= XSAVES_HOST | dict(leaves)
        self.lacking, self.msr_indices = lacking, msr_indices

    def check_extension(self, name):
        return name not in self.lacking


def test_shadow_stacks_are_offered_where_their_pointer_can_be_carried():
    leaves = shown(NewHost())
    assert (leaves[7, 0][2] & SHSTK, leaves[7, 0][3] & IBT) == (SHSTK, IBT)
    assert leaves[0xD, 1][2] == 1 << 11 | 1 << 12
    leaves = shown(NewHost(lacking=["KVM_CAP_ONE_REG"]))
    assert (leaves[7, 0][2] & SHSTK, leaves[7, 0][3] & IBT) == (0, IBT)
    leaves = shown(NewHost(msr_indices=(0x10,)))
    assert (leaves[7, 0][2] & SHSTK, leaves[7, 0][3] & IBT) == (0, 0)


def test_cet_is_taken_away_by_name():
    leaves = shown(NewHost(), changes={"shstk": False})
    assert (leaves[7, 0][2] & SHSTK, leaves[7, 0][3] & IBT) == (0, IBT)
    assert leaves[0xD, 1][2] == 1 << 11 | 1 << 12
    for changes in ({"shstk": False, "ibt": False}, {"xsaves": False}):
        leaves = shown(NewHost(), changes=changes)
        assert (leaves[7, 0][2] & SHSTK, leaves[7, 0][3] & IBT) == (0, 0)
        if "ibt" in changes:
            assert leaves[0xD, 1][2] == 0
            assert [index for leaf, index in leaves if leaf == 0xD] == [0, 1, 2, 9]
    with pytest.raises(ConfigError, match="shstk cannot be had"):
        shown(NewHost(lacking=["KVM_CAP_ONE_REG"]), changes={"shstk": True})


def test_amx_needs_the_permission():
    leaves = shown(NewHost())
    assert leaves[7, 0][3] == IBT
    assert (leaves[7, 1][0], leaves[7, 1][3]) == (1 << 4, 0)
    assert not {0x1D, 0x1E} & {leaf for leaf, _ in leaves}
    with_tiles = {
        (0xD, 0): (0b111 | 1 << 9 | 3 << 17, 0x340, 11008, 0),
        (0xD, 17): (64, 2752, 2, 0),
        (0xD, 18): (8192, 2816, 6, 0),
    }
    leaves = shown(NewHost(with_tiles))
    assert leaves[7, 0][3] == XSAVES_HOST[7, 0][3]
    assert leaves[0xD, 0] == with_tiles[0xD, 0]
    assert {0x1D, 0x1E} <= {leaf for leaf, _ in leaves}


def test_features_with_a_state_that_nobody_carries():
    every = (0xFFFFFFFF,) * 4
    leaves = shown(NewHost({(0x7, 0): every, (0x7, 1): every, (0x80000001, 0): every,
                            (0x1, 0): every, (0x12, 0): every, (0x1C, 0): every}))  # fmt: skip
    for name in ("vmx", "svm", "sgx", "sgxlc", "pks", "arch-lbr", "fred", "ibs", "lwp"):
        for leaf, subleaf, register, mask in cpu_features.find(name):
            at = ("eax", "ebx", "ecx", "edx").index(register)
            assert not leaves[leaf, subleaf][at] & mask, name
    assert leaves[7, 0][3] & 1 << 5 == 0  # user interrupts
    assert leaves[7, 1][3] & 1 << 21 == 0  # APX
    assert not {0x12, 0x1C} & {leaf for leaf, _ in leaves}


@given(
    st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.sets(st.integers(2, 63))
)  # fmt: skip
def test_only_known_components_of_xsave_are_offered(user, supervisor, subleaves):
    """Whatever a later KVM offers: what is not on the list needs somebody to look at it."""
    low, high = user & 0xFFFFFFFF | 3, user >> 32
    leaves = {(0xD, 0): (low, 576, 1 << 16, high),
              (0xD, 1): (0x1F, 576, supervisor & 0xFFFFFFFF, supervisor >> 32)}  # fmt: skip
    leaves |= {(0xD, bit): (64, 576 + 64 * bit, 0, 0) for bit in subleaves}
    leaves = shown(NewHost({**dict.fromkeys(leaves, (0, 0, 0, 0)), **leaves}))
    offered = leaves[0xD, 0][0] | leaves[0xD, 0][3] << 32
    privileged = leaves[0xD, 1][2] | leaves[0xD, 1][3] << 32
    known = {0, 1, 2, 3, 4, 5, 6, 7, 9, 17, 18}
    assert offered == sum(1 << bit for bit in known if (user | 3) >> bit & 1)
    assert privileged == sum(1 << bit for bit in (8, 11, 12) if supervisor >> bit & 1)
    shown_subleaves = {index for leaf, index in leaves if leaf == 0xD} - {0, 1}
    assert all((offered | privileged) >> bit & 1 for bit in shown_subleaves)
    if offered != user | 3:
        sizes = [64 + 576 + 64 * bit for bit in shown_subleaves & subleaves if offered >> bit & 1]
        assert leaves[0xD, 0][2] <= max([576, 11008, 2696, *sizes])
