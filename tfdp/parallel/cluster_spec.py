"""Who the workers of a job are, from what a cluster's tool puts into the environment: TF_CONFIG, or SLURM's variables.

Whatever stands there ends as a `Cluster` or as one `ConfigError`, before anything waits for a worker that cannot be.
"""

import ipaddress
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfdp.config.sections import DistributionConfig
from tfdp.parallel.cluster import Cluster
from tfdp.system.exits import ConfigError, require
from tfdp.system.messages import shown

MOST_WORKERS = 10_000  # each of which every other one watches

_EXAMPLE = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
_JOBS = ("chief", "worker")  # in the order of their workers
_POOL_JOBS = ("chief", "worker", "ps")
_NUMBER = re.compile(r"[0-9]{1,9}")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
# SLURM's notations: "n[1-2,5],m1", and "2(x3),1" for 2, 2, 2, 1.
_HOSTS = re.compile(r"(?:[^][,]|\[[^][]*\])+")
_BRACKET = re.compile(r"\[([^][]*)\]")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_COUNT = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")


@dataclass(frozen=True)
class Jobs:
    """The processes of a job with parameter servers: addresses by kind, and which of them this one is."""

    addresses: Mapping[str, tuple[str, ...]]
    kind: str
    index: int


def find_jobs(config: DistributionConfig) -> Jobs | None:
    """The processes that TF_CONFIG names for `distribution.strategy parameter_server`; None with another strategy.

    Raises:
      ConfigError: TF_CONFIG is missing or wrong.
    """
    if config.strategy != "parameter_server":
        return None
    how = "python -m tfdp.launch --num_workers 3 --num_parameter_servers 1"
    rule = f"needs TF_CONFIG with the jobs chief, worker and ps: try {how}"
    text = os.environ.get("TF_CONFIG", "")
    require(bool(text), "distribution.strategy", config.strategy, rule)
    jobs, kind, index = _read_jobs(text, _POOL_JOBS)
    for missing in sorted({*_POOL_JOBS} - {*jobs}):
        raise _refusal(f"cluster.{missing}", "must be there with distribution.strategy parameter_server")
    return Jobs({job: tuple(jobs[job]) for job in _POOL_JOBS}, kind, index)


def find_cluster(config: DistributionConfig) -> Cluster:
    """The workers of this job, from TF_CONFIG or SLURM; one worker where there is neither.

    Raises:
      ConfigError: TF_CONFIG or a variable of SLURM is wrong, or the strategy asks for workers that are not there.
    """
    cluster = Cluster()
    if config.strategy == "parameter_server":  # its chief trains alone, on what the others compute
        return cluster
    if os.environ.get("TF_CONFIG"):
        cluster = parse_tf_config(os.environ["TF_CONFIG"])
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "0", "1"):
        cluster = parse_slurm(os.environ)  # GPUs are left to SLURM's binding (--gpus-per-task)
    require(
        config.strategy != "multi_worker_mirrored" or cluster.num_workers > 1,
        "distribution.strategy",
        config.strategy,
        "needs several workers, from TF_CONFIG or SLURM: try auto, or python -m tfdp.launch --num_workers 2",
    )
    require(
        config.strategy in ("auto", "multi_worker_mirrored") or cluster.num_workers == 1,
        "distribution.strategy",
        config.strategy,
        f"is for one worker, but TF_CONFIG or SLURM name {cluster.num_workers}: try auto",
    )
    return cluster


# ---------------------------------------------------------------------------------------------------
# TF_CONFIG
# ---------------------------------------------------------------------------------------------------


def parse_tf_config(text: str) -> Cluster:
    """Reads the content of TF_CONFIG: JSON with `cluster` (lists of host:port) and this process's `task`.

    Raises:
      ConfigError: what is wrong.
    """
    jobs, kind, index = _read_jobs(text, _JOBS)
    addresses = [address for job in _JOBS for address in jobs.get(job, [])]
    return Cluster(tuple(addresses), index + (len(jobs.get("chief", [])) if kind == "worker" else 0))


def _read_jobs(text: str, known: Sequence[str]) -> tuple[dict[str, list[str]], str, int]:
    """Addresses by job, and the job and index of this process."""
    jobs, kind, index = _read_json(text)
    unknown = sorted(set(jobs) - set(known))
    if unknown:
        listed = f"{', '.join(known[:-1])} and {known[-1]}"
        raise _refusal(", ".join(unknown), f"must name the jobs {listed} only: leave the others out")
    for job, addresses in jobs.items():
        if not isinstance(addresses, list) or not addresses:
            raise _refusal(f"cluster.{job}", "must be a list of one or more host:port")
    if not isinstance(kind, str) or kind not in jobs:
        listed = ", ".join(jobs)
        raise _refusal(f"task.type {_scalar(kind)}", f"must be one of the jobs of the cluster: {listed}")
    if not _is_index(index):
        raise _refusal(f"task.index {_scalar(index)}", "must be a whole number from 0 on")
    if not 0 <= int(index) < len(jobs[kind]):
        raise _refusal(
            f"task.index {_scalar(index)}", f"must lie in 0..{len(jobs[kind]) - 1}: the job {kind} has no other"
        )
    if len(jobs.get("chief", [])) > 1:
        raise _refusal("cluster.chief", "must name one address: put the others into cluster.worker")
    _check_addresses("TF_CONFIG", [address for job in known for address in jobs.get(job, [])])
    return jobs, kind, int(index)


def _read_json(text: str) -> tuple[dict[str, Any], Any, Any]:
    """The jobs, and the type and index of this process's task; each of the latter may be anything."""
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
        jobs, task = content["cluster"], content["task"]
        kind, index = task["type"], task["index"]
        jobs = {**jobs}
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):  # the last one: of a thousand brackets
        raise _refusal(text, f"must be JSON like {_EXAMPLE}") from None
    return jobs, kind, index


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _refusal(twice, "must not be a key twice: leave one of them out")
    return content


def _is_index(value: object) -> bool:
    """Whether this is a whole number, which TensorFlow also reads from text; True is none."""
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def _scalar(value: object) -> str:
    """A value to show; of a list or an object its kind only, which may hold anything, however deep."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return str(value).lower() if isinstance(value, bool) else shown(value)


def _refusal(value: object, rule: str) -> ConfigError:
    return ConfigError(f"TF_CONFIG ({shown(value)}) {rule}")


# ---------------------------------------------------------------------------------------------------
# SLURM
# ---------------------------------------------------------------------------------------------------


def parse_slurm(variables: Mapping[str, str]) -> Cluster:
    """The workers of a SLURM job step, in the order of their ranks: those of a node stand together.

    TensorFlow's `SlurmClusterResolver` sorts hosts as text (n10 before n9), knows one bracket in a name, and expands
    whatever it is given.

    Args:
      variables: the environment of a process that `srun` has started.

    Raises:
      ConfigError: a variable is missing or wrong.
    """
    num_tasks = _slurm_number(variables, "SLURM_STEP_NUM_TASKS", MOST_WORKERS)
    rank = _slurm_number(variables, "SLURM_PROCID", num_tasks - 1)
    hosts = _expand_hosts(variables.get("SLURM_STEP_NODELIST"))
    counts = _expand_counts(variables.get("SLURM_STEP_TASKS_PER_NODE"))
    if len(hosts) != len(counts) or sum(counts) != num_tasks:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE ({shown(variables['SLURM_STEP_TASKS_PER_NODE'])}) must give each of the "
            f"{len(hosts)} nodes its tasks, {num_tasks} in all: start the workers by srun, as deploy/slurm.sh does"
        )
    job = _slurm_number({"SLURM_JOB_ID": "0", **variables}, "SLURM_JOB_ID", 10**9)
    port = 20_000 + job % 20_000  # jobs that share a node must not share a port
    addresses = [f"{host}:{port + index}" for host, count in zip(hosts, counts, strict=True) for index in range(count)]
    _check_addresses("SLURM_STEP_NODELIST", addresses)
    return Cluster(tuple(addresses), rank)


def _slurm_number(variables: Mapping[str, str], name: str, most: int) -> int:
    value = variables.get(name)
    if value is None or not _NUMBER.fullmatch(value) or int(value) > most:
        raise ConfigError(
            f"{name} ({shown(value)}) must be a whole number from 0 to {most}: start the workers by srun, "
            "or unset SLURM_STEP_NUM_TASKS to train with one"
        )
    return int(value)


def _expand_hosts(text: str | None) -> list[str]:
    """The hosts of SLURM's notation, in its order: "n[1-2],m5" stands for n1, n2 and m5."""
    problem = ConfigError(
        f"SLURM_STEP_NODELIST ({shown(text)}) must list at most {MOST_WORKERS} hosts, as in n[1-2,5],m1"
    )
    hosts: list[str] = []
    parts = _HOSTS.findall(text or "")
    if not parts or ",".join(parts) != text:
        raise problem
    for part in parts:
        texts = _BRACKET.split(part)  # by turns what stands outside the brackets and what inside
        choices = [_numbers(piece) if index % 2 else [piece] for index, piece in enumerate(texts)]
        if not all(choices) or len(hosts) + math.prod(map(len, choices)) > MOST_WORKERS:
            raise problem
        hosts += ["".join(pieces) for pieces in itertools.product(*choices)]
    return hosts


def _numbers(text: str) -> list[str]:
    """What "08-10,12" stands for: 08, 09, 10 and 12; nothing where it is wrong or too much."""
    numbers: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            return []
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MOST_WORKERS - len(numbers):
            return []
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers


def _expand_counts(text: str | None) -> list[int]:
    """The tasks of each node: "2(x3),1" stands for 2, 2, 2 and 1."""
    counts: list[int] = []
    for part in (text or "").split(","):
        match = _COUNT.fullmatch(part)
        if match is None or int(match[2] or 1) > MOST_WORKERS - len(counts):
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE ({shown(text)}) must list the tasks of each node, as in 2(x3),1"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


# ---------------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------------


def _check_addresses(variable: str, addresses: Sequence[object]) -> None:
    if len(addresses) > MOST_WORKERS:
        raise ConfigError(f"{variable} ({len(addresses)} workers) must name at most {MOST_WORKERS}")
    for address in addresses:
        if not _is_address(address):
            raise ConfigError(
                f"{variable} ({_scalar(address)}) must be host:port with a port from 1 to 65535, and a host "
                "that is a name, an IPv4 address, or an IPv6 address as in [::1]:2222"
            )
    twice = _first_repeated(str(address).lower() for address in addresses)
    if twice is not None:
        raise ConfigError(f"{variable} ({shown(twice)}) must name each address once")


def _is_address(address: object) -> bool:
    if not isinstance(address, str):
        return False
    host, _, port = address.rpartition(":")
    return bool(_NUMBER.fullmatch(port)) and 0 < int(port) < 65536 and _is_host(host)


def _is_host(host: str) -> bool:
    try:
        if host.startswith("[") and host.endswith("]"):
            return bool(ipaddress.IPv6Address(host[1:-1]))
        if re.fullmatch(r"[0-9.]+", host):
            return bool(ipaddress.IPv4Address(host))
    except ValueError:
        return False
    name = host.removesuffix(".")
    return len(name) <= 253 and all(_LABEL.fullmatch(label) for label in name.split("."))


def _first_repeated(values: Iterable[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)
