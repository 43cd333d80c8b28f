"""What makes child processes die with their parents, whichever way those die; it knows no engine and no rank."""

from __future__ import annotations
