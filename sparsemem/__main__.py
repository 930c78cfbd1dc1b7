"""`python -m sparsemem` is the `sparsemem` command."""

import sys

from sparsemem.cli import main

sys.exit(main())
