"""docs/cpu-state.md says what the code does: no ioctl and no register without a row."""

import re
from pathlib import Path

import pytest

from pyvmm.x86 import cpu_limits, msrs

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "cpu-state.md"
# Neither state nor a part of making it: what the host is asked, and running the guest.
ASKING = {
    *("KVM_GET_API_VERSION", "KVM_CHECK_EXTENSION", "KVM_GET_VCPU_MMAP_SIZE"),
    *("KVM_GET_SUPPORTED_CPUID", "KVM_GET_MSR_INDEX_LIST", "KVM_RUN", "KVM_GET_STATS_FD"),
}
NO_IOCTLS = ("KVM_CAP_", "KVM_VCPUEVENT_", "KVM_IRQCHIP_", "KVM_SREGS2_", "KVM_EXIT_")


def section(title):
    """The rows of the first table under a heading, cell by cell."""
    text = PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def registers():
    """(numbers, carried) of each row."""
    for _, numbers, carried, _ in section("Model-specific registers"):
        found = set()
        for part in numbers.split(","):
            first, _, last = part.strip().partition("-")
            found.update(range(int(first, 16), int(last or first, 16) + 1))
        yield found, carried


def used_ioctls():
    return {
        name
        for path in (ROOT / "pyvmm" / "kvm").glob("*.py")
        for name in re.findall(r'"(KVM_[A-Z0-9_]+)"', path.read_text())
        if not name.startswith(NO_IOCTLS)
    }


def test_every_ioctl_has_a_row():
    named = set()
    for title in ("What is carried", "What is the same in every VM of ours, and so in no state"):
        for row in section(title):
            named.update(re.findall(r"`(KVM_[A-Z0-9_]+)`", row[1] + " " + row[0]))
    named = {name for name in named if not name.startswith(NO_IOCTLS)}
    assert named == used_ioctls() - ASKING


def test_tests_exist():
    for row in section("What is carried"):
        for name in row[3].split(", "):
            at = ROOT / "tests" / f"{name}.py"
            program = ROOT / "guests" / "src" / f"{name}.c"
            assert at.exists() or program.exists(), name


@pytest.mark.parametrize(
    ("numbers", "carried"), list(registers()), ids=lambda value: str(value)[:30]
)
def test_register_is_carried_as_its_row_says(numbers, carried):
    if carried in ("yes", "as offset"):
        assert all(msrs.is_carried(index) for index in numbers)
    elif carried == "no":
        # What KVM does not list needs no exception.
        listed = [index for index in numbers if index not in (0x49, 0x10B, 0x4B564D08)]
        assert not any(msrs.is_carried(index) for index in listed)
    else:
        assert carried in ("in the segments", "in the LAPIC")
        assert not numbers & set(msrs.UNLISTED)


def test_every_register_that_is_read_has_a_row():
    known = [numbers for numbers, _ in registers()]
    assert set(msrs.UNLISTED) <= set().union(*known)
    assert sum(map(len, known)) == len(set().union(*known)), "a register has two rows"


def test_components_of_xsave():
    (row,) = (row[0] for row in section("What is not offered") if "components of XSAVE" in row[0])
    user, supervisor = re.match(
        r"other components of XSAVE than (.*) and, for XSAVES, (.*)", row
    ).groups()

    def mask(text):
        found = 0
        for part in text.split(", "):
            first, _, last = part.partition("-")
            for bit in range(int(first), int(last or first) + 1):
                found |= 1 << bit
        return found

    assert mask(user) == cpu_limits.COMPONENTS
    assert mask(supervisor) == cpu_limits.SUPERVISOR_COMPONENTS
