"""Reading of JSON files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = ["read_json"]


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        UserError: If the file is missing, unreadable, empty or not valid JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:  # ValueError: not UTF-8, or an invalid path
        raise UserError(f"{path}: cannot be read ({e})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON, or cut off ({e})") from None
