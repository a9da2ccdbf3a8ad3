"""Records that only workers with the same secret can write."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

SECRET, SECRET_FILE = "COMMKIT_SECRET", "COMMKIT_SECRET_FILE"
_SHORTEST = 16
_MAC_LENGTH = 64


class ForgedRecordError(ValueError):
    """A record was not written with the secret of this worker."""


class Seal:
    """Puts a message authentication code (HMAC-SHA-256) before each record: over the job, the record's place in the log,
    which keeps it from being written again elsewhere, and its text. A record that wants to join names a worker drawn at
    random, so no two are alike.

    Args:
        secret: of all workers; None seals nothing.
        job: tells runs apart.

    Raises:
        ValueError: a secret of fewer than 16 bytes.
    """

    def __init__(self, secret: bytes | None = None, job: str = "") -> None:
        if secret is not None and len(secret) < _SHORTEST:
            raise ValueError(
                f"the secret has {len(secret)} bytes and needs at least {_SHORTEST}; make one with: openssl rand -hex 32"
            )
        self._secret = secret
        self._job = job

    def close(self, position: int, text: str) -> str:
        """``text`` as it is written to ``position`` of the log."""
        return (
            text if self._secret is None else f"{self._code(self._secret, position, text)} {text}"
        )

    def open(self, position: int, sealed: str) -> str:
        """The text that :meth:`close` was given.

        Raises:
            ForgedRecordError: sealed otherwise, or not at all.
        """
        if self._secret is None:
            if not sealed.startswith("{"):
                raise ForgedRecordError(f"this worker has no secret; set {SECRET_FILE}")
            return sealed
        code, text = sealed[:_MAC_LENGTH], sealed[_MAC_LENGTH + 1 :]
        expected = self._code(self._secret, position, text)
        # In time that tells nothing of where they differ; as bytes, for what is no ASCII.
        if not hmac.compare_digest(code.encode(), expected.encode()):
            raise ForgedRecordError(f"this worker has another secret; see {SECRET_FILE}")
        return text

    def _code(self, secret: bytes, position: int, text: str) -> str:
        message = f"{len(self._job)} {self._job} {position} {text}".encode()
        return hmac.new(secret, message, hashlib.sha256).hexdigest()


def secret_of(environment: Mapping[str, str]) -> bytes | None:
    """What COMMKIT_SECRET says, or what is in the file that COMMKIT_SECRET_FILE names, without white space around it.

    Raises:
        ValueError: both, or a file that cannot be read.
    """
    given, file = environment.get(SECRET), environment.get(SECRET_FILE)
    if given is not None and file is not None:
        raise ValueError(f"{SECRET} and {SECRET_FILE} are both set; unset one")
    if file is not None:
        try:
            return Path(file).read_bytes().strip()
        except OSError as error:
            raise ValueError(
                f"{SECRET_FILE}={file!r} cannot be read ({error.strerror}); name a file that this worker may read"
            ) from error
    return None if given is None else given.encode().strip()
