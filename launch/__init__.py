"""All that starts, stops or listens: the command line, the supervisor, the HTTP server, the terminal chat.

It knows how to reach an engine and nothing of how one decides.
"""

import runpy
from pathlib import Path

# Before anything of ours is imported: with `python -m launch` the working directory comes first on sys.path, and a
# folder `configs` or `nanoengine` there would be taken for ours. The guard is run by path for the same reason.
_guard = runpy.run_path(str(Path(__file__).parent.parent / "nanoengine" / "_packages.py"))
try:
    _guard["prefer_own_packages"]("configs", "nanoengine", "workers")
except _guard["ForeignPackageError"] as error:
    raise SystemExit(f"nanoengine: {error}") from None
del _guard
