"""`zotune bench roofline` of this checkout, its flags included.

python benchmarks/roofline.py
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from zotune.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "roofline", *sys.argv[1:]]))
