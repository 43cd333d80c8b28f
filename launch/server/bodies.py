"""Reads a request's JSON, to a bounded depth; knows no field of it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

MAX_DEPTH = 64


class JsonRoute(APIRoute):
    """A route whose body is read by `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's way to put in a request class of one's own."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return bounded


class BoundedRequest(Request):
    """A request whose JSON may be nested `MAX_DEPTH` deep: what checks, renders or shows a value may be recursive."""

    async def json(self) -> Any:
        """The value. Raises HTTPException for one that is nested deeper, JSONDecodeError for what is no JSON."""
        body = await self.body()
        try:
            value = from_json(body)
        except ValueError as error:
            if "recursion limit" in str(error):  # far above ours
                raise _too_deep() from None
            return await super().json()  # says where the error is; it also takes what the fast parser is too strict for
        # Each level has a bracket, and most bodies have too few of them to be looked at.
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
            raise _too_deep()
        return value


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        children = (each for parent in level for each in (parent.values() if isinstance(parent, dict) else parent))
        level = [each for each in children if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _too_deep() -> HTTPException:
    return HTTPException(400, f"the body must be nested at most {MAX_DEPTH} levels deep")
