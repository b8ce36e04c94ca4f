"""`python -m mmfast` is the command `mmfast`."""

import sys

from mmfast.cli import main

sys.exit(main())
