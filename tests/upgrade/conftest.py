"""Two versions of pyvmm for each test: this one and a predecessor, in both orders."""

import pytest
from harness import needs, versions

PINNED = [commit for commit, _ in versions.predecessors()]


@pytest.fixture(scope="session", params=PINNED, ids=[commit[:7] for commit in PINNED])
def predecessor(request):
    """A pinned version, built beside this one."""
    try:
        return versions.commit(request.param)
    except versions.BuildError:
        raise
    except versions.VersionError as error:
        needs.history(str(error))


@pytest.fixture(params=["from the predecessor", "from the present"])
def order(request, predecessor):
    """The version that a machine is booted with, and the one that it is updated to."""
    both = [predecessor, versions.present()]
    return both if request.param == "from the predecessor" else both[::-1]
