"""`python -m launch.bench NAME …`: chooses the measurement; knows nothing of what is measured."""

from __future__ import annotations

import signal
import sys
from typing import Any

from configs.errors import ConfigError, NanoEngineError, UnknownModelError
from launch.bench import (
    control_plane,
    decode_gap,
    front_end,
    lifecycle,
    peers,
    sampling,
    serve,
    simulate,
    throughput,
)
from launch.bench.chaos import command as chaos
from launch.options import OneLineParser


def main() -> int:
    """Parse the command line and run one measurement; returns the exit code."""
    parser = OneLineParser(prog="python -m launch.bench", description="measure nanoengine on this machine")
    commands: Any = parser.add_subparsers(dest="command", required=True)
    lifecycle.add_parser(commands)
    control_plane.add_parser(commands)
    simulate.add_parser(commands)
    serve.add_parser(commands)
    throughput.add_parser(commands)
    sampling.add_parser(commands)
    decode_gap.add_parser(commands)
    front_end.add_parser(commands)
    peers.add_parser(commands)
    chaos.add_parser(commands)
    who = parser.prog
    try:
        arguments = parser.parse_args()
        who += f" {arguments.command}"
        return arguments.run(arguments) or 0
    except NanoEngineError as error:
        print(f"{who}: error: {' '.join(error.message.split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | UnknownModelError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is ended on the way
    sys.exit(main())
