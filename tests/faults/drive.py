"""Train the job of a folder on the Ray at an address: `python -m tests.faults.drive FOLDER ADDRESS NODE_IP`."""

import sys
from pathlib import Path

import ray

from expunge.errors import ExpungeError
from expunge.runs.job import JobFolder
from expunge.unlearning.train import train
from tests.faults.trainings import HoldingRecorder


def main(folder: Path, address: str, node_ip: str) -> int:
    ray.init(address, _node_ip_address=node_ip, log_to_driver=False)
    try:
        train(JobFolder(folder), warm_start=None, record=HoldingRecorder(folder))
    except ExpungeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
