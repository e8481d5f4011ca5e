"""The digest of the code that runs."""

import hashlib
from pathlib import Path


def code_sha256(*folders: Path) -> str:
    """A digest of all Python files in tfdp and further folders: the code of a run, which all workers must share."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], *folders):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()
