"""API keys, compared in constant time."""

import hashlib
import hmac
from pathlib import Path

from configs.checks import UserError, require


class ApiKeys:
    """The keys that are let in; without any, everybody is."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, headers: dict[bytes, bytes]) -> bool:
        """Whether "Authorization: Bearer KEY" or "X-Api-Key: KEY" has one of them."""
        if not self._digests:
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(given).digest()
        # Every key is compared, whichever fits: the time says nothing about which.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_keys(path: Path) -> ApiKeys:
    """One key a line; empty lines and those that begin with # are none.

    Raises:
      UserError: the file is missing, no text, or has no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: write API keys into it, one a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8: write API keys into it, one a line") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    require(bool(keys), f"{path} has no key: write API keys into it, one a line")
    return ApiKeys(keys)
