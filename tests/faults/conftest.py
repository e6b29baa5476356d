"""The process that forks, and the tiny world, once a session."""

import pytest

from tests.faults import world
from tests.faults.server import Forks


@pytest.fixture(scope="session")
def forks():
    with Forks() as started:
        yield started


@pytest.fixture(scope="session")
def template(tmp_path_factory, forks):
    return world.build(tmp_path_factory.mktemp("faults") / "world", forks)
