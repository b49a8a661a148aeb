"""`python jobs/nightly.py` is `python -m expunge.jobs.nightly`."""

import sys

from expunge.jobs.nightly import main

if __name__ == "__main__":
    sys.exit(main())
