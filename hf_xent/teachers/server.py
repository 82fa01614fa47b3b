"""Requests to a server that may fail: what may pass is tried again, later each time; what may not is an error at once.

Tried again: a connection that is refused or cut, a timeout, the statuses 408, 429 and 5xx, and answers that are not
JSON or not what was asked for. `Retry-After` is respected. All else (a wrong key, address or request) is not.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

T = TypeVar("T")
LONGEST = 300.0
"""Seconds that are waited at most before a request is made again."""
BUSY = (408, 425, 429)
REMEDIES = {
    400: "change the request as it says (vLLM takes a k up to its option --max-logprobs)",
    401: "pass api_key, or set OPENAI_API_KEY",
    403: "pass api_key, or set OPENAI_API_KEY",
    404: "check the address and the model's name: completions are asked for at <url>/completions",
}
"""Status -> what to do about it."""


class Unusable(Exception):
    """No answer, or not what was asked for; `wait` is how many seconds the server wants to be left alone."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


class Refused(RuntimeError):
    """The server will not answer this request, however often it is made; `status` says why."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class Server:
    """A server that answers JSON with JSON.

    Args:
        url: Its address, without a slash at the end.
        api_key: Sent as a bearer token; it is in no message.
        retries: How often a request is made again.
        backoff: Seconds before it is made again for the first time; each time is twice as long, up to five minutes.
        timeout: Seconds to wait for an answer.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    retries: int = 6
    backoff: float = 1.0
    timeout: float = 300.0

    def ask(self, path: str, body: Any, read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer to a request, a POST if there is a body.

        Args:
            path: What follows the address.
            body: What is sent.
            read: It raises `Unusable` for an answer that is not what was asked for.

        Raises:
            Refused: The server does not accept the request.
            RuntimeError: The last attempt failed, too; the message has the address and what came back.
        """
        for attempt in range(self.retries + 1):
            try:
                return read(self._answer(path, body))
            except Unusable as fault:
                if attempt == self.retries:
                    raise RuntimeError(
                        f"{self.url}{path} gave no usable answer in {attempt + 1} attempts, the last time {fault}:"
                        " see that the server runs and what it logs, then run this again; what is written stays"
                    ) from fault
                time.sleep(min(LONGEST, max(fault.wait, self.backoff * 2**attempt)))
        raise AssertionError("the last attempt returns or raises")

    def _answer(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=self.timeout) as answer:
                content = answer.read()
        except HTTPError as error:
            said = _shortened(error.read())
            if error.code in BUSY or error.code >= 500:
                raise Unusable(f"status {error.code} ({said})", _wait(error.headers.get("Retry-After"))) from error
            remedy = REMEDIES.get(error.code, "change the request as it says")
            raise Refused(
                f"{self.url}{path} answers with status {error.code} ({said}): {remedy}", error.code
            ) from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            raise Unusable(f"no answer ({type(cause).__name__}: {_shortened(str(cause).encode())})") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise Unusable(f"no JSON ({_shortened(content)})") from error


def _shortened(content: bytes) -> str:
    text = " ".join(content.decode(errors="replace").split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _wait(written: str | None) -> float:
    """The seconds that a header asks to wait: a number, or a date."""
    if not written:
        return 0.0
    try:
        return max(0.0, float(written))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(written) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
