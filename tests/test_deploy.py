"""deploy/, as far as a machine without a cluster can try it: scripts with what SLURM sets, the manifest by field."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
LIMIT = 30  # seconds for one command, on a busy machine


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH: a `srun` that notes and runs its command, a `scontrol` that notes, this Python as `python`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(
        folder / "srun",
        '#!/bin/sh\necho "$SRUN_CPUS_PER_TASK $*" >> "$NOTES/srun"\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\n"$@" || exit $?\nexit "${SRUN_CODE:-0}"\n',
    )
    executable(folder / "scontrol", '#!/bin/sh\necho "$*" >> "$NOTES/scontrol"\n')
    executable(folder / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    return folder


def environment(tools: Path, **extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "TF_CONFIG" and not key.startswith("SLURM_")}
    path = f"{tools}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "NOTES": str(tools.parent), **extra}


def slurm(tools: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script as SLURM would on the first of two nodes."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[01-02]"}
    return subprocess.run(
        [str(DEPLOY / "slurm.sh"), *arguments],
        cwd=tools.parent,
        env=environment(tools, **job, **extra),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def notes(tools: Path, name: str) -> list[str]:
    path = tools.parent / name
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("script", sorted(DEPLOY.glob("*.sh")), ids=lambda path: path.name)
def test_the_scripts_are_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=LIMIT)
    assert (result.returncode, result.stderr) == (0, "")


# --- SLURM -----------------------------------------------------------------------------------------


def test_the_slurm_script_starts_one_worker_per_task_with_the_users_arguments(tools: Path) -> None:
    result = slurm(tools, "--seed", "5", "--print_config")
    assert result.returncode == 0, result.stderr
    worker = "python -u -m tfdp.train --run_dir runs/slurm-4711 --seed 5 --print_config"
    assert notes(tools, "srun") == [f"8 --label --kill-on-bad-exit=0 --wait=300 {worker}"]
    resolved = yaml.safe_load(result.stdout)
    assert (resolved["seed"], resolved["run_dir"]) == (5, "runs/slurm-4711")
    assert notes(tools, "scontrol") == []


@pytest.mark.parametrize(
    ("code", "requeues", "requeued"),
    [
        ("0", "0", False),
        ("1", "0", False),
        ("2", "0", False),
        ("75", "0", True),
        ("76", "3", True),
        ("137", "19", True),
        ("76", "20", False),
    ],
)
def test_the_slurm_job_is_queued_again_when_that_helps(tools: Path, code: str, requeues: str, requeued: bool) -> None:
    result = slurm(tools, PYTHON="true", SRUN_CODE=code, SLURM_RESTART_COUNT=requeues)
    assert result.returncode == int(code)
    assert notes(tools, "scontrol") == (["requeue 4711"] if requeued else [])
    assert ("not queued again" in result.stderr) == (code == "76" and requeues == "20")


def test_slurm_is_asked_for_a_signal_before_the_limit_and_for_requeues() -> None:
    directives = re.findall(r"^#SBATCH --(\S+)$", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE)
    # Without "B:" the signal goes to the workers, not to the batch shell.
    assert {"signal=TERM@120", "requeue", "open-mode=append", "ntasks-per-node=1"} <= set(directives)


def test_outside_of_slurm_the_script_says_so(tools: Path) -> None:
    result = subprocess.run(
        [str(DEPLOY / "slurm.sh")], env=environment(tools), capture_output=True, text=True, timeout=LIMIT
    )
    assert result.returncode != 0
    assert "SLURM_JOB_ID: is set by SLURM: submit this script with sbatch" in result.stderr


# --- Kubeflow --------------------------------------------------------------------------------------

# The parts of the TFJob resource (kubeflow.org/v1) that the manifest uses: a type, a set of allowed values, or a
# mapping of known fields, where "!" marks a required one.
CONTAINER = {
    "name!": {"tensorflow"},  # the operator sets TF_CONFIG in the container of this name only
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"name": str, "containerPort!": int}],
    "resources": {"requests": dict, "limits": dict},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template!": {
        "metadata": dict,
        "spec!": {
            "terminationGracePeriodSeconds": int,
            "containers!": [CONTAINER],
            "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str}}],
        },
    },
}
TFJOB = {
    "apiVersion!": {"kubeflow.org/v1"},
    "kind!": {"TFJob"},
    "metadata!": {"name!": str, "namespace": str, "labels": dict},
    "spec!": {
        "successPolicy": {"", "AllWorkers"},
        "runPolicy": {
            "cleanPodPolicy": {"All", "Running", "None"},
            "backoffLimit": int,
            "activeDeadlineSeconds": int,
            "ttlSecondsAfterFinished": int,
        },
        "tfReplicaSpecs!": {"Worker!": REPLICAS},
    },
}


def problems(value: Any, schema: Any, path: str = "") -> list[str]:
    """Where a value departs from a schema of the kind above."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{path}: {value!r} is not one of {sorted(schema)}"]
    if isinstance(schema, type):
        right = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
        return [] if right else [f"{path}: {value!r} is not of type {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: must be a list"]
        return [problem for i, item in enumerate(value) for problem in problems(item, schema[0], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return [f"{path}: must be a mapping"]
    fields = {name.rstrip("!"): kind for name, kind in schema.items()}
    found = [f"{path}.{name}: unknown" for name in value if name not in fields]
    found += [f"{path}.{name[:-1]}: missing" for name in schema if name.endswith("!") and name[:-1] not in value]
    for name in value.keys() & fields.keys():
        found += problems(value[name], fields[name], f"{path}.{name}")
    return found


def manifest() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "tfjob.yaml").read_text())


def worker_spec() -> dict[str, Any]:
    return manifest()["spec"]["tfReplicaSpecs"]["Worker"]


def test_the_manifest_has_the_fields_of_a_tfjob() -> None:
    assert problems(manifest(), TFJOB) == []
    pod = worker_spec()["template"]["spec"]
    assert len(pod["containers"]) == 1
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    run_dir = pod["containers"][0]["args"][1]
    assert any(run_dir.startswith(mount["mountPath"] + "/") for mount in pod["containers"][0]["volumeMounts"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda job: job.update(apiVersion="kubeflow.org/v1beta1"),
            ".apiVersion: 'kubeflow.org/v1beta1' is not one of",
        ),
        (lambda job: job["spec"]["tfReplicaSpecs"].pop("Worker"), ".spec.tfReplicaSpecs.Worker: missing"),
        (lambda job: job["spec"].update(restartPolicy="Never"), ".spec.restartPolicy: unknown"),
        (lambda job: job["spec"]["tfReplicaSpecs"]["Worker"].update(replicas="2"), ".replicas: '2' is not of type int"),
    ],
)
def test_the_check_of_the_manifest_finds_mistakes(change: Any, problem: str) -> None:
    job = manifest()
    change(job)
    assert any(problem in found for found in problems(job, TFJOB)), problems(job, TFJOB)


def pod_command(*extra: str) -> list[str]:
    container = worker_spec()["template"]["spec"]["containers"][0]
    return [*container["command"], *container["args"], *extra]


def test_the_command_of_the_manifest_runs(tools: Path) -> None:
    result = subprocess.run(
        pod_command("--print_config"), env=environment(tools), capture_output=True, text=True, timeout=LIMIT
    )
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load(result.stdout)
    assert (resolved["run_dir"], resolved["training"]["steps"]) == ("/runs/tfdp", 20000)


@pytest.mark.parametrize(
    ("ends", "code"),
    [("exit 0", 0), ("exit 1", 1), ("exit 2", 2), ("exit 75", 203), ("exit 76", 204), ("kill -9 $$", 137)],
)
def test_the_pod_ends_with_a_code_that_the_operator_understands(tools: Path, ends: str, code: int) -> None:
    executable(tools / "python", f"#!/bin/sh\n{ends}\n")
    assert worker_spec()["restartPolicy"] == "ExitCode"  # 1 to 127 end the job, 128 to 255 start the pod again
    assert subprocess.run(pod_command(), env=environment(tools), timeout=LIMIT).returncode == code


def test_the_pod_hands_sigterm_on_and_waits_for_the_checkpoint(tools: Path) -> None:
    saves = "import signal, sys, time; from pathlib import Path\n"
    saves += "def stop(*_):\n    time.sleep(0.5); Path(sys.argv[1], 'saved').touch(); sys.exit(75)\n"
    saves += "signal.signal(signal.SIGTERM, stop); Path(sys.argv[1], 'ready').touch(); time.sleep(60)\n"
    (tools / "worker.py").write_text(saves)
    executable(tools / "python", f"#!/bin/sh\nexec {sys.executable} {tools}/worker.py {tools}\n")
    with subprocess.Popen(pod_command(), env=environment(tools)) as pod:
        deadline = time.monotonic() + LIMIT
        while not (tools / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(timeout=LIMIT) == 203
    assert (tools / "saved").exists()


# --- Two machines by hand --------------------------------------------------------------------------


def test_the_plain_example_sets_tf_config(tools: Path) -> None:
    executable(tools / "python", '#!/bin/sh\necho "$TF_CONFIG"\necho "$@"\n')
    workers = "10.0.0.1:2222,10.0.0.2:2222"
    for index in range(2):
        result = subprocess.run(
            [str(DEPLOY / "tf_config.sh"), "--run_dir", "/shared/run"],
            env=environment(tools, WORKERS=workers, INDEX=str(index)),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert (result.returncode, result.stderr) == (0, "")
        config, command = result.stdout.splitlines()
        assert json.loads(config) == {
            "cluster": {"worker": workers.split(",")},
            "task": {"type": "worker", "index": index},
        }
        assert command == "-u -m tfdp.train --run_dir /shared/run"


def test_the_plain_example_says_what_is_missing(tools: Path) -> None:
    result = subprocess.run(
        [str(DEPLOY / "tf_config.sh")], env=environment(tools), capture_output=True, text=True, timeout=LIMIT
    )
    assert result.returncode != 0
    assert "WORKERS: must list every worker" in result.stderr
