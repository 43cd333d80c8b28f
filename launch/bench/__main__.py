"""`python -m launch.bench NAME …`: chooses the measurement; knows nothing of what is measured."""

from __future__ import annotations

import argparse

from launch.bench import control_plane, decode_gap, lifecycle, sampling, simulate


def main() -> None:
    """Parse the command line and run one measurement."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description="measure nanoengine on this machine")
    commands = parser.add_subparsers(dest="command", required=True)
    lifecycle.add_parser(commands)
    control_plane.add_parser(commands)
    simulate.add_parser(commands)
    sampling.add_parser(commands)
    decode_gap.add_parser(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
