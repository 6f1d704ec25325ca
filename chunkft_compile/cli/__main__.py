"""`python -m chunkft_compile.cli` is the command `chunkft`."""

import sys

from chunkft_compile.cli import main

sys.exit(main())
