"""For all tests of the repository."""

import functools
import os
import tempfile
from pathlib import Path

# Before any library brings OpenMP in: spinning threads on few cores make every step crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from httpx._transports import default as transports
from hypothesis import settings

# No example fails for taking long: the machine may be busy.
settings.register_profile("stoker", deadline=None)
settings.load_profile("stoker")
# No test may depend on, or leave behind, what `stoker tune` writes for the user.
_data = tempfile.TemporaryDirectory(prefix="stoker-test-data-")
os.environ["XDG_DATA_HOME"] = _data.name

# Each httpx client reads the machine's certificate authorities anew, 20 ms a time; once is enough.
transports.create_ssl_context = functools.cache(transports.create_ssl_context)


@pytest.hookimpl(tryfirst=True)  # before markers are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lies in contrib/ needs a distribution of contrib/."""
    for item in items:
        if Path(__file__).parent / "contrib" in item.path.parents:
            item.add_marker(pytest.mark.contrib)
