"""What an owner has found of prepared models, kept so that only that owner can have written it.

    STATE/owner.key              32 random bytes, mode 0600, in a directory of mode 0700
    STATE/verdicts/DIGEST        HMAC-SHA-256(key, text + set-up digest), hexadecimal

STATE is $XDG_STATE_HOME/private-lora, or ~/.local/state/private-lora. A verdict says of one set-up
digest: this owner verified it, or made it. Whoever prepares or alters a model cannot write one
that is believed, nor is one of another owner or another digest. The key never leaves this file's
class; it protects no text and no secret of the cipher, and losing it costs one more verification.
"""

from __future__ import annotations

import hmac
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from backends.files import read_bounded, replacing
from backends.he.manifest import PreparationError

KEY_BYTES = 32
_TEXT = b"private-lora: this owner verified the set-up, v1: "  # what is verified has a version
_log = logging.getLogger(__name__)


class Verdicts:
    """The verdicts in one state directory. Nothing is written before the first one is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def holds(self, setup_digest: bytes) -> bool:
        """Whether this owner has accepted that set-up.

        Raises PreparationError when the key is one that others may know or have written.
        """
        key = self._key()
        if key is None:
            return False
        try:
            kept = read_bounded(self._path(setup_digest), 256)
        except OSError:
            return False
        return hmac.compare_digest(kept.strip(), self._tag(key, setup_digest))

    def keep(self, setup_digest: bytes) -> None:
        """Accept a set-up from now on. A disk that takes no verdict is only warned of.

        Raises PreparationError when the key is one that others may know or have written.
        """
        try:
            key = self._key() or self._new_key()
            with replacing(self._path(setup_digest)) as file:
                file.write(self._tag(key, setup_digest) + b"\n")
        except OSError as error:
            _log.warning(
                "%s takes no verdict (%s): the model will be verified again next time; "
                "XDG_STATE_HOME names another place",
                self.directory, error.strerror or error,
            )  # fmt: skip

    def _path(self, setup_digest: bytes) -> Path:
        return self.directory / "verdicts" / setup_digest.hex()

    @staticmethod
    def _tag(key: bytes, setup_digest: bytes) -> bytes:
        return hmac.new(key, _TEXT + setup_digest, "sha256").hexdigest().encode()

    def _key(self) -> bytes | None:
        """The owner's key, None when there is none yet."""
        path = self.directory / "owner.key"
        try:
            for place in (self.directory, path):
                self._require_own(place)
            key = read_bounded(path, KEY_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise PreparationError(
                f"{path} cannot be read: {error.strerror or error}; delete it, and prepared models "
                "are verified again"
            ) from error
        if len(key) != KEY_BYTES:
            raise PreparationError(
                f"{path} is not {KEY_BYTES} bytes long; delete it, and prepared models are "
                "verified again"
            )
        return key

    @staticmethod
    def _require_own(place: Path) -> None:
        """Raise PreparationError when others may read or replace it."""
        if os.name != "posix":
            return  # modes mean nothing there
        found = place.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PreparationError(
                f"{place} is open to others, so verdicts kept there prove nothing; delete it, and "
                "prepared models are verified again"
            )

    def _new_key(self) -> bytes:
        """Make the key, unless another process has just made it; returns the one that counts."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self._require_own(self.directory)
        path = self.directory / "owner.key"
        aside = self.directory / f".owner.key.{os.getpid()}.{os.urandom(4).hex()}"
        descriptor = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(descriptor)
            with suppress(FileExistsError):
                os.link(aside, path)  # whole or not at all, and never over another key
        finally:
            aside.unlink()
        key = self._key()
        if key is None:
            raise OSError(f"{path} went away")
        return key


def owner_verdicts() -> Verdicts:
    """Those of the user who runs this process."""
    base = os.environ.get("XDG_STATE_HOME")
    return Verdicts((Path(base) if base else Path.home() / ".local" / "state") / "private-lora")
