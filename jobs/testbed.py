"""Train one of the shipped testbed models: `python jobs/testbed.py faces`. A killed run resumes where it stopped."""

import argparse
from importlib import import_module
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["faces", "flags"])
    parser.add_argument("--out", type=Path, help="where the pipeline is saved (default: the package's own copy)")
    parser.add_argument("--work", type=Path, default=Path(".testbed"), help="checkpoints of this run")
    parser.add_argument("--steps", type=int, help="fewer steps, for a try-out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = import_module(f"expunge.testbed.{args.model}")
    out = args.out or Path(str(recipe.__file__)).parent / "models" / args.model
    recipe.run(out, args.work, args.steps, args.seed)
    print(f"saved to {out}")


if __name__ == "__main__":
    main()
