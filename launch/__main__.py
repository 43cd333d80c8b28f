"""`python -m launch`: the command line, nothing else."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
