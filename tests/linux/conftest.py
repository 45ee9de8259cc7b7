"""These tests need a KVM on which Linux boots; ``nested.plugin`` finds or makes one."""

import os

import pytest
from nested import kvm


@pytest.fixture(scope="session", autouse=True)
def linux_boots():
    if kvm.boots_linux():
        return
    reason = "this /dev/kvm cannot run Linux; leave out --linux-kvm=here"
    if os.environ.get("PYVMM_NESTED"):
        pytest.fail(f"inside the nested machine: {reason}", pytrace=False)
    pytest.skip(reason)
