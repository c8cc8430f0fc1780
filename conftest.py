"""For all tests of the repository."""

import os

# Before any library brings OpenMP in: spinning threads on few cores make every step crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
