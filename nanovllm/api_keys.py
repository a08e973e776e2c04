"""The keys that open an HTTP server: one variable and one file, for servers and clients alike."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from nanovllm.settings import SettingsError

API_KEY_VARIABLE: Final = "NANOVLLM_API_KEY"
ADMIN_KEY_VARIABLE: Final = "NANOVLLM_ADMIN_KEY"


def api_keys(
    variable: str, file: str, option: str = "--api-key-file", name: str = API_KEY_VARIABLE
) -> list[str]:
    """All keys.

    Args:
        variable: what the variable holds: keys with commas between them.
        file: a path, of a file with a key a line; empty for none.
        option: what names the file, for errors.
        name: the variable's, for errors.

    Raises:
        SettingsError: the file cannot be read or has no key, or a key is malformed.
    """
    given = variable.split(",")
    if file:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise SettingsError(f"{option} {file} cannot be read: {why}") from None
        lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not lines:
            raise SettingsError(f"{option} {file} has no key: write one into each line")
        given += lines
    keys = [key.strip() for key in given if key.strip()]
    if not all(key.isascii() and key.isprintable() and not set(key) & {" ", ","} for key in keys):
        raise SettingsError(
            f"{option} or {name}: a key is printable ASCII without spaces and commas"
        )
    return keys
