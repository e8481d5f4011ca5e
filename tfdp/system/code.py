"""The code that runs, as one digest."""

import hashlib
from pathlib import Path


def code_sha256(*folders: Path) -> str:
    """A digest of the Python files of tfdp and of further folders, and of all folders in them: the code of a run.

    It must be the same on all workers.
    """
    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], *folders):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()
