"""One launch of two processes, and one of four, for all tests of this folder.

A test names its scenarios, `@pytest.mark.in_processes(2, "ddp/plain")`, and finds what
they left in the directory `launched`. Only the scenarios of the tests that were
collected run.
"""

import pytest

from tests.helpers.processes.launching import launch
from tests.helpers.processes.scenarios import SCENARIOS


def scenarios_of(items, processes):
    """What the collected tests need of this number of processes, by SCENARIOS."""
    marks = [mark.args for item in items for mark in item.iter_markers("in_processes")]
    wanted = {name for count, *names in marks if count == processes for name in names}
    assert wanted <= SCENARIOS.keys(), wanted - SCENARIOS.keys()
    return [name for name in SCENARIOS if name in wanted]


@pytest.fixture(scope="session")
def two_processes(request, tmp_path_factory):
    names = scenarios_of(request.session.items, 2)
    return launch(2, tmp_path_factory.mktemp("two"), names)


@pytest.fixture(scope="session")
def four_processes(request, tmp_path_factory):
    names = scenarios_of(request.session.items, 4)
    return launch(4, tmp_path_factory.mktemp("four"), names)


@pytest.fixture
def launched(request):
    """The directory of the test's scenarios: `launched / "plain"` of "ddp/plain"."""
    (mark,) = request.node.iter_markers("in_processes")
    processes, name = mark.args[:2]
    fixture = {2: "two_processes", 4: "four_processes"}[processes]
    return request.getfixturevalue(fixture) / name.split("/")[0]
