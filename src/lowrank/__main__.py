"""`python -m lowrank`, and so `torchrun -m lowrank train run.yaml`."""

import sys

from lowrank.cli import main

if __name__ == "__main__":
    sys.exit(main())
