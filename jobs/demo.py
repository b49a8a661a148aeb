"""`python jobs/demo.py` is `python -m expunge.jobs.demo`."""

import sys

from expunge.jobs.demo import main

if __name__ == "__main__":
    sys.exit(main())
