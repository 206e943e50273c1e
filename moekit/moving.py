"""The moves at the end of a save, run as a program of its own, so that they outlive a killed run.

    python moving.py PLACE FOLDER

It imports as little as it can: it starts in some milliseconds.
"""

import contextlib
import json
import os
import sys

# The mark of a temporary folder whose files are all on the disk: their names, as a JSON list.
WHOLE = ".whole"


def move(place: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Move the files that the mark in ``place`` names to ``folder``; those that were moved before are left out."""
    with open(os.path.join(place, WHOLE), encoding="utf-8") as mark:
        names = json.load(mark)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(place, name), os.path.join(folder, name))


if __name__ == "__main__":
    move(*sys.argv[1:])
