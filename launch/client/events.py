"""Server-sent events out of bytes, as they arrive; knows neither HTTP nor what the events say.

Source: the WHATWG HTML standard, section 9.2.6 "Interpreting an event stream". The data of events is of
interest here, and the id of the latest one; their types and retry times are read over.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 64 * 2**20

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class EventParser:
    """Takes bytes in pieces of any size, cut anywhere.

    Attributes:
        last_id: what the latest event that had an id was called, for `Last-Event-ID`; empty when none had.
    """

    def __init__(self) -> None:
        self.last_id = ""
        self._id: bytes | None = None  # of the event that has not ended yet
        self._rest = b""  # the line that has not ended yet
        self._data: list[bytes] = []  # of the event that has not ended yet
        self._num_bytes = 0
        self._after_cr = False
        self._is_first_line = True

    def feed(self, piece: bytes) -> list[str]:
        """The data of each event that this piece completes, in order.

        Raises:
            ValueError: an event is larger than MAX_EVENT_BYTES, or not UTF-8.
        """
        after_cr, self._after_cr = self._after_cr, piece.endswith(b"\r")
        if after_cr and piece.startswith(b"\n"):  # the second half of a line end that was cut in two
            piece = piece[1:]
        *lines, self._rest = _LINE_END.split(self._rest + piece)
        events = [data for line in lines if (data := self._take(line)) is not None]
        if self._num_bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is larger than {MAX_EVENT_BYTES} bytes")
        return events

    def _take(self, line: bytes) -> str | None:
        """Note one line; returns the event's data when the line ends an event that has some."""
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            data, self._data, self._num_bytes = self._data, [], 0
            if self._id is not None:
                self.last_id, self._id = self._id.decode(), None
            return b"\n".join(data).decode() if data else None
        name, _, value = line.partition(b":")  # a comment is a line without a name
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._num_bytes += len(line)
        elif name == b"id" and b"\0" not in value:
            self._id = value.removeprefix(b" ")
        return None
