"""The command line of a measurement at one resolution."""

import argparse
from pathlib import Path


def read(description: str | None) -> argparse.Namespace:
    """Read `out`, the file for the result, `side` and `tiny`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=64, help="of the square pictures, in pixels")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()
