"""The error tree of the whole product; it knows nothing of the code that raises them.

Every condition that a user can reach raises one of these; asserts are for invariants alone. An error can
cross a process boundary as plain data (`to_wire` / `from_wire`), so that the person who can act on it sees it.
"""

from __future__ import annotations

from typing import Any


class NanoEngineError(Exception):
    """Root of the tree. `fields` names the attributes that travel with the message between processes."""

    fields: tuple[str, ...] = ()

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(NanoEngineError, ValueError):
    """A setting is outside its range; the message names field, value and allowed range."""

    fields = ("field",)

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelError(NanoEngineError):
    """A model cannot be used as it is."""


class UnknownModelError(ModelError, ValueError):
    """A model name that the registry does not know; the message lists the known ones."""


class CheckpointError(ModelError):
    """A model directory or a weight file is missing, incomplete, misshapen or of a refused format."""


class TokenizerError(ModelError):
    """The tokenizer is missing or does not fit the model."""


class CapacityError(NanoEngineError):
    """More memory is asked for than there is; the message gives the numbers."""


class RequestError(NanoEngineError, ValueError):
    """A request cannot be served as it stands (HTTP 400). `param` names the field at fault."""

    fields = ("param", "code")

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(NanoEngineError):
    """More requests are queued than the settings allow; a later attempt may succeed (HTTP 429)."""


class RequestTimeoutError(NanoEngineError):
    """A request was not complete at its deadline (HTTP 504)."""


class EngineError(NanoEngineError, RuntimeError):
    """The engine failed, not the request (HTTP 500 or 503)."""


class EngineDeadError(EngineError):
    """The scheduler process is gone and no request can be served any more."""

    @classmethod
    def because_of(cls, cause: NanoEngineError) -> EngineDeadError:
        """A new one that says why; of one of its own kind, a copy."""
        is_own = isinstance(cause, EngineDeadError)
        error = cls(cause.message if is_own else f"the engine died: {cause.message}")
        error.__cause__ = cause.__cause__ if is_own else cause
        return error


class WorkerError(EngineError):
    """A rank died, stalled or raised; `rank` says which (None: not known).

    `reason` is a word for statistics, which stays in the process: died, raised, silent, overdue, broken or failed.
    """

    fields = ("rank",)

    def __init__(self, message: str, rank: int | None = None, reason: str = "failed") -> None:
        super().__init__(message)
        self.rank, self.reason = rank, reason


class StepError(EngineError):
    """A step found no memory and was given up; the ranks live, and go on once they are told to begin anew.

    `rank` says whose memory it was, `step_id` which step; both stay in the process.
    """

    def __init__(self, message: str, rank: int | None = None, step_id: int = 0) -> None:
        super().__init__(message)
        self.rank, self.step_id = rank, step_id


class ChannelError(EngineError):
    """A frame between scheduler and worker is malformed, forged, replayed, too old or too large."""


class DeadlineError(EngineError):
    """A wait came to its deadline; the message names whom it waited for."""


_TREE: dict[str, type[NanoEngineError]] = {
    cls.__name__: cls
    for cls in (
        NanoEngineError,
        ConfigError,
        ModelError,
        UnknownModelError,
        CheckpointError,
        TokenizerError,
        CapacityError,
        RequestError,
        QueueFullError,
        RequestTimeoutError,
        EngineError,
        EngineDeadError,
        WorkerError,
        StepError,
        ChannelError,
        DeadlineError,
    )
}


def to_wire(error: BaseException) -> dict[str, Any]:
    """Render an error as primitives (for JSON or msgpack). A foreign exception becomes an `EngineError`."""
    if isinstance(error, NanoEngineError):
        kind, message = type(error).__name__, error.message
        return {"kind": kind, "message": message} | {name: getattr(error, name) for name in error.fields}
    return {"kind": "EngineError", "message": f"{type(error).__name__}: {error}"}


def from_wire(data: dict[str, Any]) -> NanoEngineError:
    """Rebuild what `to_wire` rendered; an unknown kind becomes an `EngineError`."""
    cls = _TREE.get(str(data.get("kind")), EngineError)
    known = {name: data[name] for name in cls.fields if name in data}
    return cls(str(data.get("message", "unknown error")), **known)
