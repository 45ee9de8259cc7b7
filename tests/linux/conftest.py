"""These tests need a KVM on which Linux boots; ``nested.plugin`` finds or makes one."""

import os

import pytest
from nested import kvm, packages


@pytest.fixture(scope="session", autouse=True)
def linux_boots():
    if not kvm.boots_linux():
        reason = "this /dev/kvm cannot run Linux; leave out --linux-kvm=here"
        if os.environ.get("PYVMM_NESTED"):
            pytest.fail(f"inside the nested machine: {reason}", pytrace=False)
        pytest.skip(reason)
    try:
        packages.fetch()
    except packages.MissingError as error:
        if os.environ.get("PYVMM_REQUIRE_KVM") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
