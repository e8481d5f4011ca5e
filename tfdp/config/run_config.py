"""The configuration stored in a run directory, and how two configurations differ."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tfdp.config import options, sections, strict_yaml
from tfdp.system.exits import ConfigError
from tfdp.system.files import follow_links
from tfdp.system.messages import shown

CONFIG_FILE = "config.yaml"  # of a run directory: the configuration of the run
RESOLVED_FILE = "resolved.yaml"  # the same, if the user has put a config.yaml of their own there


def with_run_config(argv: Sequence[str]) -> list[str]:
    """Adds the configuration stored in the run directory that `argv` names, if any; `--config` and flags win over it.

    So `--run_dir` alone resumes a run as it was, and everything else on the command line is a change. A flag or a
    `--config` names the directory, but not the config.yaml of another run, which is read without its `run_dir`. A link
    such as runs/latest is followed here, once: it may name another run a moment later.
    """
    flags, paths = options.values_of("--run_dir", argv), [Path(path) for path in options.values_of("--config", argv)]
    in_files = {path: str(run_dir) for path in paths if (run_dir := strict_yaml.read(path).get("run_dir")) is not None}
    ignored = [path for path in in_files if is_record(path)]
    named = flags or [run_dir for path, run_dir in in_files.items() if path not in ignored]
    if not named or not named[-1]:
        return [*argv, "--run_dir=null"] if ignored else list(argv)
    try:
        run_dir = str(follow_links(Path(named[-1])))
    except OSError as error:
        raise ConfigError(f"run_dir ({shown(Path(named[-1]))}) must be a folder: {error.strerror}") from None
    records = config_records(Path(run_dir))
    if len(set(flags)) > 1 or (flags and not records and run_dir == flags[-1]):
        return list(argv)  # `load` refuses a flag with two values; and a new directory brings nothing
    rest = options.without("--run_dir", argv)
    return [*(f"--config={path}" for path in records), *rest, f"--run_dir={run_dir}"]


def config_records(run_dir: Path) -> list[Path]:
    """The files with the configuration of a run, later ones winning; [] for a directory without a configuration.

    resolved.yaml includes a user's own config.yaml, which is read again on top of it only if it has changed since.
    """
    own, resolved = run_dir / CONFIG_FILE, run_dir / RESOLVED_FILE
    if not resolved.is_file():
        return [own] if own.is_file() else []
    is_changed = own.is_file() and file_sha256(own).encode() not in resolved.read_bytes().partition(b"\n")[0]
    return [resolved, own] if is_changed else [resolved]


def recorded_values(run_dir: Path) -> dict[str, Any]:
    """The configuration of a run by dotted key; {} for a directory without one."""
    content: dict[str, Any] = {}
    for path in config_records(run_dir):
        content |= flatten_yaml(path.read_text(encoding="utf-8"))
    return content


def is_record(path: Path) -> bool:
    """Whether a YAML file is the stored configuration of a run, by its location, and not a file that a user wrote."""
    folder = path.parent
    if path.name not in (CONFIG_FILE, RESOLVED_FILE):
        return False
    named = strict_yaml.read(path).get("run_dir")
    return is_begun(folder) or (named is not None and Path(str(named)).resolve() == folder.resolve())


def is_begun(run_dir: Path) -> bool:
    """Whether a run has written into this directory."""
    return (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flatten_yaml(text: str) -> dict[str, Any]:
    """The values of a configuration in YAML by dotted key, under their current names; {} if it is no mapping."""
    import yaml

    content = yaml.safe_load(text)
    flat = flatten_mapping(content) if isinstance(content, dict) else {}
    return {options.RENAMED.get(key, key): value for key, value in flat.items()}


def differing_keys(old_yaml: str, new_yaml: str) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ between two configurations, with both values; `run_dir`, only a name, is ignored."""
    old, new = flatten_yaml(old_yaml), flatten_yaml(new_yaml)
    old |= {key: value for key, value in standard_defaults().items() if key in new and key not in old}
    keys = [key for key in {**old, **new} if key != "run_dir"]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


@functools.cache
def standard_defaults() -> dict[str, Any]:
    """The defaults of the sections by dotted key, as YAML and JSON write them: the value of a key in a run from before
    the key existed."""
    defaults: dict[str, Any] = {
        "model": sections.ModelConfig(),
        "data": sections.DataConfig(),
        "optimizer": sections.OptimizerConfig(),
        "training": sections.TrainingConfig(),
        "distribution": sections.DistributionConfig(),
        "checkpoint": sections.CheckpointConfig(),
    }
    return flatten_mapping(json.loads(json.dumps({name: asdict(each) for name, each in defaults.items()})))


def changed_keys(old_yaml: str, new_yaml: str) -> list[str]:
    """The keys whose values differ between two configurations, as "key: old -> new"."""
    return [f"{key}: {old} -> {new}" for key, (old, new) in differing_keys(old_yaml, new_yaml).items()]


def flatten_mapping(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten_mapping(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
