"""Every error a user can meet, with the HTTP status it becomes.

    EmbedServeError                500
    ├── BadRequest                 400  malformed: not JSON, empty upload, truncated image
    ├── Unauthorized               401  no API key, or an unknown one
    ├── Forbidden                  403  the key may not do this; the URL may not be fetched
    ├── NotFound                   404  unknown collection, item, model, label set
    ├── Conflict                   409  the collection was made with another encoder, name taken
    ├── TooLarge                   413  more bytes, pixels or items than the limit
    ├── UnsupportedMedia           415  not an image, or a format that is switched off
    ├── InvalidField               422  a well-formed request with a value that is not allowed
    ├── Busy                       429  the queue is full; carries Retry-After
    ├── NotReady                   503  still starting, shutting down, or the probe failed
    └── BundleError                500  an encoder bundle that is missing, damaged or does not match

A message says three things: the value, what was allowed, and the fix. `param` names the field of the
request that was wrong, `code` is a stable word for programs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadRequest",
    "BundleError",
    "Busy",
    "Conflict",
    "EmbedServeError",
    "Forbidden",
    "InvalidField",
    "NotFound",
    "NotReady",
    "TooLarge",
    "Unauthorized",
    "UnsupportedMedia",
    "closest",
]


class EmbedServeError(Exception):
    """Base of the tree. `str(error)` is the message for the user.

    Args:
        message: The value, what was allowed, and the fix, in one or two sentences.
        param: The request field at fault, such as `input[3]` or `dimensions`.
        code: A stable word for programs; defaults to the class's own.
    """

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or type(self).code

    def at(self, param: str) -> EmbedServeError:
        """Names the request field at fault, unless a more precise one is known already."""
        self.param = self.param or param
        return self


class BadRequest(EmbedServeError):
    status, code, type = 400, "bad_request", "invalid_request_error"


class Unauthorized(EmbedServeError):
    status, code, type = 401, "invalid_api_key", "authentication_error"


class Forbidden(EmbedServeError):
    status, code, type = 403, "forbidden", "permission_error"


class NotFound(EmbedServeError):
    status, code, type = 404, "not_found", "not_found_error"


class Conflict(EmbedServeError):
    status, code, type = 409, "conflict", "conflict_error"


class TooLarge(EmbedServeError):
    status, code, type = 413, "too_large", "invalid_request_error"


class UnsupportedMedia(EmbedServeError):
    status, code, type = 415, "unsupported_media", "invalid_request_error"


class InvalidField(EmbedServeError):
    status, code, type = 422, "invalid_field", "invalid_request_error"


class Busy(EmbedServeError):
    """The queue is full. `retry_after` is the whole number of seconds for the Retry-After header."""

    status, code, type = 429, "busy", "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int = 1, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class NotReady(EmbedServeError):
    status, code, type = 503, "not_ready", "server_error"


class BundleError(EmbedServeError):
    status, code, type = 500, "bundle_error", "server_error"


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a "not found" message: the closest known word, else the known words.

    >>> closest("strater", ["starter"])
    "did you mean 'starter'?"
    """
    words = sorted(known)
    if not words:
        return "there are none yet."
    near = difflib.get_close_matches(word, words, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(f"'{name}'" for name in words[:10])
    return f"known: {shown}{', …' if len(words) > 10 else '.'}"
