"""Forms of the log: lines of text for people, one JSON object a line for machines; knows no process and no level.

A record is about a request when it was given one (`extra={"request_id": …}`), or when it was written while one was
served (`current_request_id`). What a client sent and what it was answered is never logged.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from contextvars import ContextVar
from typing import Any

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
"""The id of the request that this task serves; None outside of one."""


def formatter(log_format: str, who: str) -> logging.Formatter:
    """The form `text` or `json`; `who` is the process that writes."""
    return JsonFormatter(who) if log_format == "json" else TextFormatter(who)


def request_id_of(record: logging.LogRecord) -> str | None:
    """The request that a record is about, if it is about one."""
    given = getattr(record, "request_id", None)
    return current_request_id.get() if given is None else str(given)


class TextFormatter(logging.Formatter):
    """Time, level, process and message; the request's id behind it, unless the message names it."""

    def __init__(self, who: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {who.replace('%', '%%')}: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, before a traceback."""
        line, request_id = super().formatMessage(record), request_id_of(record)
        return line if request_id is None or request_id in line else f"{line} [{request_id}]"


class JsonFormatter(logging.Formatter):
    """An object with time (UTC), level, process, pid, logger, message, and request_id and exception if any.

    A record may bring more: `extra={"fields": {…}}`.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._who,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= getattr(record, "fields", {})
        request_id = request_id_of(record)
        if request_id is not None:
            fields["request_id"] = request_id
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)
