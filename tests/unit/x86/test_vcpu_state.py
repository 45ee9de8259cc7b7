"""A vCPU's state as bytes: they are what every image writes, and the kernel's structures come
back from them as they were."""

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._native import ffi
from pyvmm.errors import VmStateError
from pyvmm.vmstate.cursor import Cursor
from pyvmm.vmstate.fields import Array, CStruct, Record, Scalar, Struct
from pyvmm.x86 import vcpu_state
from pyvmm.x86.vcpu_state import VCPU

STRUCTURES = [field for field in VCPU.fields if isinstance(field, CStruct)]
#: What pyvmm made of whole(), with pdptrs and ssp, before its states were the kernel's structures:
#: every image since the first one that was used writes and reads this.
GOLDEN = (
    "c-muNU|?osWMXDz=jLT%VqxRr6O&?QX5-`+Ra9qT;ouRG(J^6V<>HrAHg{xW;}Me6a`Izm=Mz;n^o{1=5RlN"
    "Yh{)jN6q44pPcG%+5|J}<%WLB17E?6$t?cLFkx;P-X_>>zE2Zuj-M^BLPe#ivY1TG=emPz5%%z6~1QZMc3N~"
    "C26jU+}E#G}tNJzyjs_xh;VPQ4P_|}WxQ+n>QybzSrwr~xK&#7#am$!?ZeJgD8f`^F<a@OuTe&yl2-yEV!+S"
    "*}_H}r1n-!*+^^U*UbxuCXd`jU<N%+2$bi8RNbmh8&9QTp`Le;!FSV+Y?TXXmz40oR|Thu(W%@~g3L_KK~C&"
    "fj_Y&EJ3CyI!44=1ImS0`;<5<}QJ8*%hsmqNBG9ooskJ|6KczHOxDYU4HQP7rTg}UV8d@bJnXx)?9aLJvu^@"
    "@@qP$E#9#ARB`e1XeZ5Y*BPIbmcCB(vEcbA{;$0JeR`OiGIvGA$E;{yJ&DT7&$$U9ma0`%Ukg&BU5u)$zZYj"
    "E`P<jj{4C4QjPj|i{asm7kQ!N6_qV39ydbT<{(pU4U3GCoBV$u@Yg<EO6LV`v&%|B^1||mvV7#%gvaxe;a&h"
    "zU^6?7@3JHsdiit}|N=eJe%E>DzDk-a|s;O&eYH91}>ggL88X23InweWzT3OrJ+S!llAL06eiHHFeumdq8l+"
    "Dr9%-YdAdCsin7WVE*vz9M!Y31yjzHrl));8{mb5`s<*w)TFW#Rf0=h{2?r!U)f`8K8Qad32Uc5!uc_we-c_"
    "VM-e4+snj4hanlkBE$lj){$nPe@EkPDxEm&&bTm&dJToFDNW3E-5W5uc)l5uBol72WF1ume#iRj?S*`p5DIx"
    "2@@wxo-%dX^cgc}&7L!N-uwj%7cE}0blLJ1D_5;vvv%G34I4LY-m-Pu_8mKS?cTF@-~Iy!4;?;o^w{weCr_O"
    "|bN1Z%3l}e4zH;^2^&2;D-M(}8-u(v;A3c8Z^x5+lFJHZW^Y-2Q4<A2${_^$P_a8rh{r>a!-~UnnkNST^`yb"
    "er0Ahg#cyYp1&cM#X2Eqpz7#g91tS`PY@$bLIEu(4X91xpT{z53Z<*j7i#CfZC9KCdZ&Romu0$#h{FsP|6VE"
    "hjT=Z}Mo5)C}|Q!3&Tn|%CTVU@HO3Yxi}b@fXASsB-Gx?41hgxGe;Cpt~k%5$G#TJ1C6p(Aja_tdbpVT)M#v"
    "&(XI%aRL9^$Su8N{Wh+ia02(zyNhR!+$7X<$-G|E-rwmtOtsJU;qGS5>wy"
)
XSAVE, LAPIC = bytes(range(64)) * 9, bytes(range(256)) * 4


class Count:
    """Gives numbers that count up, each cut to its width."""

    def __init__(self):
        self.last = 0

    def next(self, size):
        self.last += 1
        return self.last * 0x0101_0203_0507_0B0D & (1 << 8 * size) - 1


def fill(made, description, count):
    """Give each member of a structure a number; what their bytes are in a stream."""
    out = b""
    for field in description.fields:
        if isinstance(field, Struct):
            out += fill(getattr(made, field.name), field.inner, count)
            continue
        size = Scalar.KINDS[field.kind][1]
        numbers = [count.next(size) for _ in range(getattr(field, "count", 1))]
        setattr(made, field.name, numbers if isinstance(field, Array) else numbers[0])
        out += b"".join(number.to_bytes(size, "big") for number in numbers)
    return out


def members(type):
    """The C structure's integers by path, in its order: (path, offset, bytes)."""
    for name, field in type.fields:
        if field.type.kind == "struct":
            for path, offset, size in members(field.type):
                yield f"{name}.{path}", field.offset + offset, size
        elif field.type.kind == "array":
            for number in range(field.type.length):
                at = field.offset + number * ffi.sizeof(field.type.item)
                yield f"{name}[{number}]", at, ffi.sizeof(field.type.item)
        else:
            yield name, field.offset, ffi.sizeof(field.type)


def whole(**changes):
    """A state of which each number is another one."""
    count = Count()
    state = Record(mp_state=3, xsave=XSAVE, xsave_size=len(XSAVE), lapic=LAPIC)
    for field in STRUCTURES:
        made = field.make()
        fill(made, field.inner, count)
        setattr(state, field.name, made)
    state.xcrs = Record(nr_xcrs=2, flags=0, xcrs=[Record(xcr=i, value=i + 7) for i in range(2)])
    state.nmsrs, state.msrs = 3, (0x10, 1 << 63, 0x277, 0x0007_0406_0007_0406, 0xC0000081, 5)
    state.tsc_khz, state.has_tsc_offset, state.tsc_offset = 2_500_000, 1, (1 << 64) - 12345
    state.nent, state.cpuid = 2, tuple(count.next(4) for _ in range(14))
    state.__dict__.update(changes)
    return state


def encode(state):
    out = bytearray()
    VCPU.save(out, state)
    return bytes(out)


def decode(data):
    source = Cursor(data)
    state = VCPU.load(source, VCPU.version)
    assert source.at == len(data)
    return state


@pytest.mark.parametrize("field", STRUCTURES, ids=lambda field: field.inner.name)
def test_structure_in_memory_is_the_one_in_the_stream(field):
    made = field.make()
    expected = fill(made, field.inner, Count())
    out = bytearray()
    field.save(out, Record(**{field.name: made}))
    assert bytes(out) == expected
    loaded = Record()
    field.load(Cursor(expected), loaded)
    assert bytes(ffi.buffer(getattr(loaded, field.name))) == bytes(ffi.buffer(made))


@pytest.mark.parametrize("field", STRUCTURES, ids=lambda field: field.inner.name)
def test_nothing_of_a_structure_is_left_out(field):
    """But what is reserved, and flags that KVM neither tells nor takes."""
    made = field.make()
    fill(made, field.inner, Count())
    memory = bytes(ffi.buffer(made))
    missing = {
        path for path, at, size in members(ffi.typeof(made).item) if not any(memory[at : at + size])
    }
    assert missing <= {"nmi.pad", "flags"}


def test_registers_are_read_from_and_given_to_the_kernel_as_they_are():
    words = tuple(range(100, 100 + 7 * 5))
    made = vcpu_state._cpuid2(words)
    assert made.nent == 5
    names = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
    assert [getattr(made.entries[i], name) for i in range(5) for name in names] == list(words)

    class Vcpu:
        def get_cpuid2(self):
            found = ffi.new("struct kvm_cpuid2 *", {"entries": 256})
            ffi.memmove(found, made, ffi.sizeof("struct kvm_cpuid2") + 5 * 40)
            return found

    assert vcpu_state._cpuid(Vcpu()) == words


def test_bits_that_follow_what_the_guest_does_make_no_other_cpuid():
    def leaf(function, **registers):
        values = {"eax": 1, "ebx": 2, "ecx": 3 << 8, "edx": 4 << 12} | registers
        return (function, 0, 0, *values.values())

    before = leaf(1) + leaf(7) + leaf(0xD) + leaf(0x80000001)
    running = leaf(1, ecx=3 << 8 | 1 << 27 | 1 << 3, edx=4 << 12 | 1 << 9)
    running += leaf(7, ecx=3 << 8 | 1 << 4) + leaf(0xD, ebx=832) + leaf(0x80000001)
    assert vcpu_state._fixed(before) == vcpu_state._fixed(running)
    for at in (4, 7 + 4, 14 + 3, 21 + 5):
        other = list(before)
        other[at] ^= 1
        assert vcpu_state._fixed(before) != vcpu_state._fixed(tuple(other)), at


def test_bytes_are_those_of_older_images():
    golden = zlib.decompress(base64.b85decode(GOLDEN))
    state = whole(pdptrs=[1, 2 << 12, 3 << 32, (1 << 64) - 1], ssp=0x7FFF_FFFF_F000)
    assert encode(state) == golden
    assert encode(decode(golden)) == golden


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4), st.integers(1, 1 << 63))
def test_what_was_saved_is_loaded(pdptrs, ssp):
    data = encode(whole(pdptrs=pdptrs, ssp=ssp))
    state = decode(data)
    assert (list(state.pdptrs), state.ssp) == (pdptrs, ssp)
    assert encode(state) == data
    assert encode(decode(encode(whole()))) == encode(whole())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mp_state": 5}, "mp_state 5 does not exist"),
        ({"msrs": (0x10, 1, 0x277, 2, 0x10, 1)}, "an MSR is there twice"),
        ({"nmsrs": 4097, "msrs": (0,) * 8194}, "4097 elements, at most 4096"),
        ({"nent": 257, "cpuid": (0,) * 1799}, "257 elements, at most 256"),
    ],
)
def test_impossible_state_is_refused(changes, problem):
    with pytest.raises(VmStateError, match=problem):
        decode(encode(whole(**changes)))


def test_error_names_the_register_that_is_cut_off():
    data = encode(whole())
    sizes = {"regs/rax": 4, "regs/rip": 4 + 16 * 8, "sregs/cs/base": 4 + 18 * 8}
    sizes["sregs/ds/selector"] = sizes["sregs/cs/base"] + 23 + 12
    sizes["cpuid/cpuid[1]/edx"] = len(data) - 4
    sizes["cpuid/cpuid[0]/function"] = len(data) - 56
    end = len(data) - 56 - 4 - 8 - 1 - 4
    sizes["events/exception_payload"] = end - 8
    for path, start in sizes.items():
        for cut in (start, start + 1):
            with pytest.raises(VmStateError, match="truncated") as error:
                VCPU.load(Cursor(data[:cut]), VCPU.version)
            assert error.value.path == path
