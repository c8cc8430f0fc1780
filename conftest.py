"""For all tests of the repository."""

import os

# Before any library brings OpenMP in: spinning threads on few cores make every step crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hypothesis import settings

# No example fails for taking long: the machine may be busy.
settings.register_profile("stoker", deadline=None)
settings.load_profile("stoker")
