"""The digest of the code that runs."""

import hashlib
import importlib.util
from pathlib import Path


def code_sha256(*others: Path) -> str:
    """A digest of all Python files in tfdp and in other folders, or of a single file: the code of a run, which all
    workers must share."""
    digest = hashlib.sha256()
    for place in (Path(__file__).parents[1], *others):
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            name = path.relative_to(path.parent if path == place else place).as_posix()
            digest.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def place_of(module: str) -> Path | None:
    """The folder of the package that a module is of, or the file of a module of its own; None where there is none."""
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package) if package not in ("", "__main__") else None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    return file.parent if spec.submodule_search_locations else file
