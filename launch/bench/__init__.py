"""Measurements, each a subcommand of `python -m launch.bench`; a bound on time in the README is shown by one."""
