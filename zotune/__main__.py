"""`python -m zotune`."""

import sys

from zotune.cli import main

if __name__ == "__main__":
    sys.exit(main())
