"""`make bench`: what is measured beside what, in one run, as ratios. ARGS="pages …": the pages."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["LOG_LEVEL"] = "WARNING"
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bench.settings")
os.environ["SYSTEM_HOURLY_LIMIT_USD"] = "1000000000"
os.environ["EMERGENCY_THRESHOLD_USD"] = "1000000000"

from mswap_site import embedded


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("what", nargs="?", choices=("api", "pages"), default="api")
    parser.add_argument("--rounds", type=int, help="api: 3, pages: 15")
    parser.add_argument("--seconds", type=float, default=4.0, help="api: length of a run")
    parser.add_argument("--rows", type=int, default=5_000_000, help="pages: rows of usage")
    options = parser.parse_args()

    embedded.prepare_environment()
    from bench import api, pages

    if options.what == "pages":
        pages.run(options.rows, options.rounds or 15)
    else:
        api.run(options.rounds or 3, options.seconds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
