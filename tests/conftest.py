"""Before torch is imported: OpenMP threads that wait sleep, so that the suite also runs well on a shared machine.

Tests marked ``compatible("what")`` are the rows of the compatibility table in ktlib/integrations/README.md.
``--compatibility FILE`` writes what came of them, with the versions they ran on, for ``make compatibility``.
"""

import json
import os
from collections import Counter, defaultdict

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from support import extension  # noqa: F401  before anything imports ktlib


@pytest.fixture
def one_thread():
    """Tiny steps are fastest on one thread, above all when the tests share the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def logged(caplog):
    """A function that returns what ktlib has logged in this test so far: a list of texts."""
    return lambda: [record.getMessage() for record in caplog.get_records("call") if record.name == "ktlib"]


def pytest_addoption(parser):
    parser.addoption("--compatibility", metavar="FILE", help="write the results of tests marked `compatible` as JSON")


def pytest_configure(config):
    config.addinivalue_line("markers", "compatible(what): a test of this row of the compatibility table")
    if config.getoption("--compatibility"):
        config.pluginmanager.register(_Compatibility(config.getoption("--compatibility")))


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("compatible", marker.args[0]) for marker in item.iter_markers("compatible")]


class _Compatibility:
    """Counts outcomes by row and writes them at the end of the session."""

    def __init__(self, file):
        self.file, self.rows = file, defaultdict(Counter)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            for name, what in report.user_properties:
                if name == "compatible":
                    self.rows[what][report.outcome] += 1

    def pytest_sessionfinish(self):
        from ktlib.runs.versions import facts

        with open(self.file, "w", encoding="utf-8") as file:
            json.dump({"versions": facts(), "rows": self.rows}, file, indent=1)
