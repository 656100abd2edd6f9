"""Rewards from a server: a judge that lives elsewhere, asked over HTTP."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from logging import getLogger
from typing import Any
from urllib.parse import urlsplit

import httpx

log = getLogger(__name__)

LONGEST_WAIT = 60.0
"""Seconds between two attempts at most."""
BODY, BODY_PER_ANSWER = 1 << 16, 64
"""Bytes that a reply may have, and how many more for each answer: more than any spelling of so many numbers."""
LARGEST = 3.4028234663852886e38
"""Of float32, in which rewards are added up."""
EXCERPT = 200
"""Characters of a reply that an error shows."""
SECRET = ("authorization", "proxy-authorization", "cookie")
"""Headers that would be written into the run's config.yaml if they were part of the configuration."""
HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class _PassingError(Exception):
    """What may be gone at the next attempt."""


class RemoteReward:
    """A callable for `RewardFunction` that asks a server.

    Each request is a POST with the JSON object {"prompts": [...], "answers": [...], "records": [...]}, three lists of
    equal length; the reply is a JSON list with one finite number for each. Every rank asks for its own answers, so a
    server sees as many clients as there are ranks. A run can be resumed exactly if the server gives the same answer
    the same reward.

    What may pass is tried again: a connection that fails or breaks, a reply that does not come in time, a status of
    500 or more. Everything else is an error at once: other statuses, redirections included, and replies that are not
    what was asked for.

    Args:
        url: Where to, http:// or https://. It is written to the run's config.yaml: no password belongs into it.
        batch_size: Answers per request at most.
        time_limit: Seconds that a request may take, from connecting to the end of its reply.
        retries: Further attempts for a request that failed in passing.
        backoff: Seconds before the second attempt; they double before each further one, up to 60.
        headers: Further headers. They too are written to the run's config.yaml.
        token_env: Name of the environment variable that holds a token, sent as `Authorization: Bearer <token>`. It is
            read whenever it is needed, and neither kept nor written anywhere.

    Raises:
        ValueError: An argument cannot be, or there is no such variable.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        time_limit: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        headers: dict[str, str] | None = None,
        token_env: str | None = None,
    ) -> None:
        self.url, self.batch_size, self.time_limit = url, batch_size, time_limit
        self.retries, self.backoff = retries, backoff
        self.headers, self.token_env = dict(headers or {}), token_env
        self._check()
        self._all_headers()
        parts = urlsplit(url)
        # What messages and `RewardFunction.name` say: without the query, where some servers want a key.
        self.__name__ = f"{parts.scheme}://{parts.netloc}{parts.path}"

    def __call__(self, prompts: list[str], answers: list[str], records: list[dict[str, Any]]) -> list[float]:
        """One number for each answer; see the class.

        Raises:
            ValueError: The server could not be reached, refused, or gave something else. Names the URL, what came and
                what was expected.
        """
        scores: list[float] = []
        with httpx.Client(timeout=self.time_limit, follow_redirects=False) as client:
            for start in range(0, len(answers), self.batch_size):
                part = slice(start, start + self.batch_size)
                scores += self._scores(client, prompts[part], answers[part], records[part])
        return scores

    def _scores(
        self, client: httpx.Client, prompts: list[str], answers: list[str], records: list[dict[str, Any]]
    ) -> list[float]:
        try:
            asked = json.dumps({"prompts": prompts, "answers": answers, "records": records}, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward server {self.__name__}: a record cannot be written as JSON: {error}") from error
        for attempt in range(self.retries + 1):
            try:
                return _within(self.time_limit, lambda: self._attempt(client, asked, len(answers)))
            except (_PassingError, httpx.TransportError, TimeoutError) as error:
                what = str(error) if isinstance(error, _PassingError) else self._failure(error)
                if attempt == self.retries:
                    times = f"{attempt + 1} attempt{'s' if attempt else ''}"
                    raise ValueError(
                        f"reward server {self.__name__}: no rewards after {times}: {what}; expected a JSON list of "
                        f"{len(answers)} numbers. Check that the server runs and can be reached from here"
                    ) from error
                wait = min(self.backoff * 2**attempt, LONGEST_WAIT)
                log.warning("reward server %s: %s; asking again in %g s", self.__name__, what, wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, client: httpx.Client, asked: bytes, count: int) -> list[float]:
        deadline = time.monotonic() + self.time_limit
        with client.stream("POST", self.url, content=asked, headers=self._all_headers()) as reply:
            body = b"".join(self._chunks(reply, deadline, BODY + BODY_PER_ANSWER * count))
        status = f"status {reply.status_code}"
        if reply.status_code >= 500:
            raise _PassingError(f"got {status}: {self._excerpt(body)}")
        if reply.status_code != 200:
            raise self._refusal(f"{status}: {self._excerpt(body)}", "status 200")
        return self._parsed(body, count)

    def _chunks(self, reply: httpx.Response, deadline: float, largest: int) -> Iterator[bytes]:
        """The body as it was sent, as long as there is time and room for it."""
        size = 0
        for chunk in reply.iter_raw():  # raw: a small compressed body may unfold to a huge one
            size += len(chunk)
            if size > largest:
                raise self._refusal(f"a reply of more than {largest} bytes", "a list of numbers")
            if time.monotonic() > deadline:
                raise TimeoutError
            yield chunk

    def _parsed(self, body: bytes, count: int) -> list[float]:
        expected = f"a JSON list of {count} finite numbers"
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self._refusal(f"what is not JSON: {self._excerpt(body)}", expected) from error
        if not isinstance(values, list):
            raise self._refusal(f"{type(values).__name__}: {self._excerpt(body)}", expected)
        if len(values) != count:
            raise self._refusal(f"a list of {len(values)}", expected)
        for place, value in enumerate(values):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) <= LARGEST:  # written so that NaN fails
                raise self._refusal(f"{str(value)[:EXCERPT]} at place {place}", f"{expected} within float32")
        return [float(value) for value in values]

    def _failure(self, error: Exception) -> str:
        if isinstance(error, (httpx.TimeoutException, TimeoutError)):
            return f"no whole reply within {self.time_limit:g} s"
        return f"{type(error).__name__}: {error}"

    def _refusal(self, got: str, expected: str) -> ValueError:
        return ValueError(f"reward server {self.__name__}: expected {expected}, got {got}")

    def _excerpt(self, body: bytes) -> str:
        """The beginning of a reply on one line; a server may repeat what it was sent, the token included."""
        text = body.decode("utf-8", errors="replace")
        if token := self._token():
            text = text.replace(token, "***")
        text = " ".join(text.split())
        return repr(text[:EXCERPT]) + ("..." if len(text) > EXCERPT else "") if text else "an empty body"

    def _all_headers(self) -> dict[str, str]:
        # Compressed bodies are not read: see _chunks.
        own = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        token = self._token()
        return own | self.headers | ({} if token is None else {"Authorization": f"Bearer {token}"})

    def _token(self) -> str | None:
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "").strip()
        if not token:
            raise ValueError(f"token_env: the environment variable {self.token_env} is not set; expected a token in it")
        if not _is_printable(token):  # httpx would show it in its complaint
            raise ValueError(f"token_env: {self.token_env} holds characters that a header cannot hold")
        return token

    def _check(self) -> None:
        try:
            parts, _ = urlsplit(self.url), httpx.URL(self.url)
        except (ValueError, httpx.InvalidURL) as error:
            raise ValueError(f"url: {self.url!r} is none: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: expected http://host/path or https://host/path, got {self.url!r}")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url: it holds a user or password, which would be written to config.yaml; set token_env")
        limits = {"batch_size": self.batch_size >= 1, "retries": self.retries >= 0, "backoff": self.backoff >= 0}
        limits["time_limit"] = self.time_limit > 0
        if wrong := [name for name, right in limits.items() if not right or not math.isfinite(getattr(self, name))]:
            raise ValueError(f"{wrong[0]}: got {getattr(self, wrong[0])}; expected a finite number, large enough")
        for name, value in self.headers.items():
            if name.lower() in SECRET:
                raise ValueError(f"headers: {name} would be written to config.yaml; set token_env instead")
            if not HEADER.fullmatch(name) or not _is_printable(value):
                raise ValueError(f"headers: {name!r} cannot be sent: expected plain ASCII without line breaks")


def _within(seconds: float, work: Callable[[], list[float]]) -> list[float]:
    """What `work` gives, or TimeoutError: httpx limits each read of a reply, so one that trickles in would never end.

    The work is left alone then; it ends at its next read, at the latest with the client.
    """
    future: Future[list[float]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def _is_printable(text: str) -> bool:
    return all(" " <= character <= "~" for character in text)
