"""Every error a client can see, as OpenAI renders them; knows no route.

`{"error": {"message", "type", "param", "code"}}`, as the body of a response or as an event of a stream that has begun.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from configs.errors import (
    CapacityError,
    DeadlineError,
    EngineDeadError,
    NanoEngineError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    TokenizerError,
)

INVALID_REQUEST = "invalid_request_error"
AUTHENTICATION = "authentication_error"
NOT_FOUND = "not_found_error"
RATE_LIMIT = "rate_limit_error"
TIMEOUT = "timeout_error"
UNAVAILABLE = "service_unavailable_error"
SERVER = "server_error"
# Routes of OpenAI's and vLLM's servers that a client may well ask for, and that are not here.
NOT_IMPLEMENTED = (
    "/v1/assistants", "/v1/audio/", "/v1/batches", "/v1/conversations", "/v1/embeddings", "/v1/files",
    "/v1/fine_tuning/", "/v1/images/", "/v1/messages", "/v1/moderations", "/v1/realtime", "/v1/rerank",
    "/v1/responses", "/v1/score", "/v1/threads", "/v1/vector_stores", "/v1/videos", "/classify", "/embed", "/pooling",
    "/rerank", "/score",
)  # fmt: skip


class ApiError(Exception):
    """An answer that is an error: its HTTP status and what the body says."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code = status, _sendable(message), type, code
        self.param = None if param is None else _sendable(param)

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The whole response, with further headers."""
        headers = dict(headers or {})
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (429, 503):
            headers["Retry-After"] = "1"
        if self.status == 501:
            headers["X-Should-Retry"] = "false"  # openai's client would ask twice more
        return JSONResponse(self.body(), self.status, headers)


def _sendable(text: str) -> str:
    """A message quotes what was sent, which may hold half a surrogate pair: it has no UTF-8 form."""
    return text.encode(errors="backslashreplace").decode()


def from_exception(error: Exception) -> ApiError:
    """Render an exception; one that is not of our tree is a fault of ours and is not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, error.message, param=error.param, code=error.code)
    if isinstance(error, QueueFullError):
        return ApiError(429, error.message, RATE_LIMIT, code="queue_full")
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, error.message, TIMEOUT, code="request_timeout")
    if isinstance(error, CapacityError | TokenizerError):
        return ApiError(400, error.message)
    if isinstance(error, EngineDeadError | DeadlineError):
        return ApiError(503, error.message, UNAVAILABLE, code="engine_dead")
    if isinstance(error, NanoEngineError):
        return ApiError(500, error.message, SERVER)
    return ApiError(500, "internal error; the server's log says more", SERVER)


def model_not_found(name: str, served: str) -> ApiError:
    """The 404 for a model that is not served here."""
    return ApiError(
        404,
        f"the model {name!r:.200} does not exist; this server has {served!r}",
        NOT_FOUND,
        "model",
        "model_not_found",
    )


def install(app: FastAPI) -> None:
    """Make every error of the app one of ours."""

    async def on_known(request: Request, error: Exception) -> JSONResponse:
        return from_exception(error).response()

    async def on_unknown(request: Request, error: Exception) -> JSONResponse:
        # The middlewares that add the header have been left.
        return from_exception(error).response({"X-Request-Id": request.state.request_id})

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _from_validation(error).response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = _from_http(error, request).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, on_known)
    app.add_exception_handler(NanoEngineError, on_known)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_unknown)  # it is raised again after the answer, and uvicorn logs it


def _from_http(error: HTTPException, request: Request) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404 and request.url.path.startswith(NOT_IMPLEMENTED):
        message = f"{where:.200} is not implemented: this server generates text, see GET /openapi.json"
        return ApiError(501, message, SERVER, code="not_implemented")
    if error.status_code == 404:
        return ApiError(404, f"there is no {where:.200}", NOT_FOUND, code="route_not_found")
    if error.status_code == 405:
        return ApiError(405, f"{request.url.path:.200} does not take {request.method}", code="method_not_allowed")
    return ApiError(error.status_code, str(error.detail))


def _from_validation(error: RequestValidationError) -> ApiError:
    """The first of pydantic's complaints, as one sentence that names the field and what was sent."""
    first = error.errors()[0]
    where = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {where[-1]}")
    if not where:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    wanted = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    got = json.dumps(first["input"], ensure_ascii=False, default=repr)
    return ApiError(400, f"{param} must be {wanted}, got {got:.100}", param=param, code="invalid_type")
