"""The log as text and as JSON: one record a line, with the id of the request that it is about."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from nanoengine.logs import current_request_id, formatter


def record(message: str, *values: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("nano", logging.WARNING, __file__, 1, message, values, None)
    vars(made).update(extra)
    return made


def test_json_is_an_object_a_line() -> None:
    made = record("two\nlines of %d", 5, request_id="r-1", fields={"status": 200})
    text = formatter("json", "worker rank 3").format(made)
    assert "\n" not in text
    said = json.loads(text)
    time = said.pop("time")
    assert time.endswith("Z")
    assert len(time) == len("2026-01-01T00:00:00.000Z")
    assert isinstance(said.pop("pid"), int)
    assert said == {
        "level": "warning",
        "process": "worker rank 3",
        "logger": "nano",
        "message": "two\nlines of 5",
        "status": 200,
        "request_id": "r-1",
    }


def test_json_holds_a_traceback() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        made = record("it failed")
        made.exc_info = sys.exc_info()
    said = json.loads(formatter("json", "server").format(made))
    assert "ValueError: no" in said["exception"]
    assert "request_id" not in said


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_what_is_logged_while_a_request_is_served_has_its_id(log_format: str) -> None:
    token = current_request_id.set("abc")
    try:
        text = formatter(log_format, "server").format(record("something"))
    finally:
        current_request_id.reset(token)
    assert "abc" in text
    assert "abc" not in formatter(log_format, "server").format(record("something"))


def test_text_names_the_process_and_the_request_once() -> None:
    form = formatter("text", "100% server")
    assert form.format(record("a request ends", request_id="r-1")).endswith(" 100% server: a request ends [r-1]")
    assert form.format(record("request r-1 ends", request_id="r-1")).endswith("request r-1 ends")
