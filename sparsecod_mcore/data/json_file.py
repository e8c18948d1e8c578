"""Reading what somebody else may have written: JSON objects, or a sentence about what they are instead."""

import json
from pathlib import Path
from typing import Any

from sparsecod_mcore.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `UserError` if it cannot be read or is something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content
