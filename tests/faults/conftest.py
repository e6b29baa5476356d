"""The tiny world, once a session."""

import pytest

from tests.faults import world


@pytest.fixture(scope="session")
def template(tmp_path_factory, forks):
    return world.build(tmp_path_factory.mktemp("faults") / "world", forks)
