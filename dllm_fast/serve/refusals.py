"""Errors as OpenAI's clients read them: a status, and an object that names the field."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import Response

LONGEST = 500  # characters of a message: a value in it may be of any size
KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


class Refusal(Exception):
    """A request that gets no answer. ``param``: the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message[:LONGEST], param, code

    @property
    def content(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return json_response(self.content, self.status, headers)


def json_response(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """In ASCII: a message may quote text that is no UTF-8."""
    return Response(json.dumps(content), status, headers, "application/json")


def of_value_error(error: ValueError | str, field: Callable[[str], str | None]) -> Refusal:
    """What `Options` and `plan_row` say, which begins with the option's name; ``field``: from that to the request's."""
    message = str(error)
    return Refusal(400, message, field(re.match(r"\w*", message)[0]))  # type: ignore[index]


def of_validation(errors: Sequence[dict[str, Any]]) -> Refusal:
    """The first thing that is wrong with a body. Of a field that takes several kinds of values, all are named."""
    place = tuple(part for part in errors[0]["loc"] if part != "body")
    param = str(place[0]) if place and isinstance(place[0], str) else None
    if errors[0]["type"] == "extra_forbidden":
        return Refusal(400, f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    reasons = dict.fromkeys(error["msg"] for error in errors if error["loc"][:2] == errors[0]["loc"][:2])
    where = ".".join(map(str, place)) if len(reasons) == 1 else param
    return Refusal(400, f"{where or 'body'}: {'; or '.join(reasons)}", param)
