"""All that decides: requests, sequences, scheduling, blocks, messages, clients. It touches no tensor."""

from nanoengine._packages import check_packages
from nanoengine.version import __version__

check_packages("configs")

__all__ = ["__version__"]
