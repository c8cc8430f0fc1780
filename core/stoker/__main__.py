"""``python -m stoker``: the same as the command ``stoker``."""

import sys

from stoker.cli import main

sys.exit(main())
