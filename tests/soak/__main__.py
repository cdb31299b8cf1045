"""``python -m soak``, which ``nox -s soak`` calls."""

import sys

from soak.run import main

sys.exit(main())
