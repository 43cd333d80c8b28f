"""The version, in one place: the wheel, `/version` and `--version` read it here. It knows nothing else."""

__version__ = "0.1.0"
