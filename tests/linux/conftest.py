"""These tests need a KVM on which Linux boots; ``nested.plugin`` finds or makes one."""

import pytest
from harness import needs
from nested import kvm, packages


@pytest.fixture(scope="session", autouse=True)
def linux_boots():
    if not kvm.boots_linux():
        needs.missing("this /dev/kvm cannot run Linux; leave out --linux-kvm=here")
    try:
        packages.fetch()
    except packages.MissingError as error:
        needs.missing(str(error))
