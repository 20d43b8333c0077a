"""Small files that appear as a whole or not at all, and JSON that may be damaged."""

import json
import os
from pathlib import Path


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Replace a small file as a whole, durably. OSError leaves what was there, and nothing beside it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a loss of power after the rename may leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path):
    """What a JSON file holds.

    Raises:
        ValueError: it is damaged, or nested too deeply, for which Python raises RecursionError.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or remove it and run again what wrote it") from error
