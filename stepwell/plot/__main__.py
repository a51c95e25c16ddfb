"""`python -m stepwell.plot FOLDER`: makes the pictures of the documentation again."""

from __future__ import annotations

import sys
from pathlib import Path

from .documentation import write

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m stepwell.plot FOLDER, such as docs/pictures")
    for path in write(Path(sys.argv[1])):
        print(path)
