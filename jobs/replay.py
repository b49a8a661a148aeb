"""`python jobs/replay.py` is `python -m expunge.jobs.replay`."""

import sys

from expunge.jobs.replay import main

if __name__ == "__main__":
    sys.exit(main())
