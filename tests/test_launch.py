"""The launcher, with small programs in place of the workers: their environment, output, signals and ends."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfdp import launch
from tfdp.parallel import restarts

ROOT = Path(__file__).parents[1]
LIMIT = 30  # seconds for one job, on a busy machine

# What every stand-in starts with: its index, its arguments, and a file that counts its starts.
PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
run_dir = Path(sys.argv[1])
cluster = json.loads(os.environ["TF_CONFIG"])
index = cluster["task"]["index"]
starts = run_dir / f"starts{index}"
run_dir.mkdir(parents=True, exist_ok=True)
with starts.open("a") as file:
    file.write(json.dumps({"cluster": cluster, "pid": os.getpid()}) + "\\n")
attempt = len(starts.read_text().splitlines())
def checkpoint(step):
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
def wait_for(condition):
    while not condition():
        time.sleep(0.01)
"""

Job = subprocess.Popen[str]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory; at the end of the test no worker that has written its number there may be alive."""
    yield tmp_path / "run"
    left = [pid for pid in pids(tmp_path / "run") if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def start(run_dir: Path, body: str, environment: dict[str, str] | None = None, **config: float) -> Job:
    """Starts a job whose workers run `body`; `config` are fields of LaunchConfig."""
    worker = run_dir.with_name("worker.py")
    worker.write_text(PREAMBLE + textwrap.dedent(body))
    program = (
        "import sys; from pathlib import Path; from tfdp import launch; "
        f"sys.exit(launch.run_job(launch.LaunchConfig(**{config!r}), [{str(run_dir)!r}], Path({str(run_dir)!r}), "
        f"[sys.executable, '-u', {str(worker)!r}]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: Job) -> tuple[int, str, str]:
    """Waits for a job; its exit code, stdout and stderr."""
    try:
        stdout, stderr = job.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return job.returncode, stdout, stderr


def starts(run_dir: Path, index: int) -> list[dict]:
    """What worker `index` noted at each of its starts."""
    path = run_dir / f"starts{index}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pids(run_dir: Path) -> list[int]:
    return [start["pid"] for path in run_dir.glob("starts*") for start in starts(run_dir, int(path.name[6:]))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)


def ready(run_dir: Path, num_workers: int) -> None:
    """Waits until every worker has made its file `ready`."""
    wait_until(lambda: all((run_dir / f"ready{index}").exists() for index in range(num_workers)))


# --- What a worker gets ----------------------------------------------------------------------------


def test_each_worker_gets_its_place_in_one_cluster_and_its_share_of_the_cores(run_dir: Path) -> None:
    num_cores = len(os.sched_getaffinity(0))
    body = """
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    facts = [sorted(os.sched_getaffinity(0)), [os.environ.get(name) for name in names], os.getsid(0) == os.getpid()]
    print(json.dumps(facts))
    """
    code, stdout, _ = finish(start(run_dir, body, {"CUDA_VISIBLE_DEVICES": "4,5,6,7,9"}, num_workers=2))
    assert code == 0
    facts = {line[:10]: json.loads(line[11:]) for line in stdout.splitlines()}
    clusters = [starts(run_dir, index)[0]["cluster"] for index in range(2)]
    assert [cluster["task"] for cluster in clusters] == [{"type": "worker", "index": index} for index in range(2)]
    assert clusters[0]["cluster"] == clusters[1]["cluster"]
    addresses = clusters[0]["cluster"]["worker"]
    assert len(set(addresses)) == 2
    assert all(re.fullmatch(r"127\.0\.0\.1:\d{4,5}", address) for address in addresses)
    (cores_0, settings_0, leads_0), (cores_1, settings_1, leads_1) = facts["[worker 0]"], facts["[worker 1]"]
    assert leads_0 and leads_1
    assert [settings_0[3], settings_1[3]] == ["4,5", "6,7"]
    if num_cores >= 2:
        assert set(cores_0).isdisjoint(cores_1)
        assert sorted(cores_0 + cores_1) == sorted(os.sched_getaffinity(0))
    assert settings_0[:3] == [str(max(1, num_cores // 2)), str(max(2, num_cores // 2)), str(max(1, num_cores // 2))]


# --- Output ----------------------------------------------------------------------------------------


def test_lines_of_three_workers_arrive_whole_in_order_and_named(run_dir: Path) -> None:
    body = """
    for number in range(2000):
        print(f"{number} " + str(index) * 200)
        if number % 10 == 0:
            print(f"note {number}", file=sys.stderr)
    sys.stdout.write("the end")
    """
    code, stdout, stderr = finish(start(run_dir, body, num_workers=3))
    assert code == 0
    for index in range(3):
        name = f"[worker {index}] "
        lines = [line.removeprefix(name) for line in stdout.splitlines() if line.startswith(name)]
        assert lines == [*(f"{number} " + str(index) * 200 for number in range(2000)), "the end"]
        notes = [line.removeprefix(name) for line in stderr.splitlines() if line.startswith(name)]
        assert notes == [f"note {number}" for number in range(0, 2000, 10)]
    assert len(stdout.splitlines()) == 3 * 2001


def test_a_line_is_shown_when_it_is_written(run_dir: Path) -> None:
    body = """
    print("now")
    wait_for((run_dir / "go").exists)
    """
    job = start(run_dir, body, num_workers=1)
    assert job.stdout is not None
    assert job.stdout.readline() == "[worker 0] now\n"
    (run_dir / "go").touch()
    assert finish(job)[0] == 0


def test_a_reader_that_leaves_does_not_end_the_workers(run_dir: Path) -> None:
    body = """
    for number in range(2000):
        print("x" * 200)
    (run_dir / "done").touch()
    """
    job = start(run_dir, body, num_workers=1)
    assert job.stdout is not None
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(timeout=LIMIT) == 0
    assert (run_dir / "done").exists()
    job.communicate()


# --- Exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "stopping", "expected"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),
        ([2, 76], False, 2),
        ([1, 76], False, 1),
        ([76, -9], False, 76),
        ([0, -6], False, 1),  # it crashed
        ([76, -11], False, 1),
        ([-9, -6], False, 76),  # of a kill from outside, after which TensorFlow may abort the others
        ([-1, 76], False, 76),
        ([75, 75], False, 75),
        ([75, 76], False, 75),
        ([-15, -15], True, 75),
        ([-15, -15], False, 76),
        ([75, 1], True, 1),
        ([3, 0], False, 1),
    ],
)
def test_the_code_of_the_job_follows_from_those_of_its_workers(codes: list[int], stopping: bool, expected: int) -> None:
    assert restarts.job_code(codes, stopping) == expected


def test_a_mistake_of_the_user_is_said_once_and_never_restarted(run_dir: Path) -> None:
    body = """
    print("error: seed (x) must be a whole number", file=sys.stderr)
    sys.exit(2)
    """
    code, _, stderr = finish(start(run_dir, body, num_workers=2, max_restarts=3))
    assert code == 2
    assert len(re.findall(r"^\[worker \d\] error: seed \(x\) must be a whole number$", stderr, re.MULTILINE)) == 1
    assert len(starts(run_dir, 0)) == 1 and "restart" not in stderr


def test_a_worker_that_stops_on_request_stops_the_job_without_a_restart(run_dir: Path) -> None:
    code, _, stderr = finish(start(run_dir, "checkpoint(40); sys.exit(75)", num_workers=2, max_restarts=3))
    assert code == 75
    assert stderr.splitlines()[-1] == (
        f"launch: stopped on request; the newest checkpoint is that of step 40; resume with --run_dir {run_dir}"
    )
    assert len(starts(run_dir, 0)) == 1


@pytest.mark.parametrize(("end", "expected"), [("sys.exit(1)", 1), ("os.kill(os.getpid(), signal.SIGKILL)", 76)])
def test_without_restarts_the_code_tells_a_failure_from_a_lost_worker(run_dir: Path, end: str, expected: int) -> None:
    body = f"""
    if index == 1:
        {end}
    time.sleep(0.3)
    sys.exit(76)
    """
    code, _, stderr = finish(start(run_dir, body, num_workers=2))
    assert code == expected
    how = "was killed by SIGKILL" if expected == 76 else r"ended with exit code 1 \(it failed\)"
    assert re.search(rf"^launch: worker 1 \(pid \d+\) {how}; waiting up to 15 s for the others$", stderr, re.MULTILINE)
    assert re.search(r"^launch: worker 0 \(pid \d+\) ended with exit code 76 \(it lost a peer\)$", stderr, re.MULTILINE)
    assert "launch: the job failed, --max_restarts is 0; there is no checkpoint yet; resume with" in stderr


# --- Restarts --------------------------------------------------------------------------------------


def test_a_killed_worker_leads_to_a_restart_from_the_newest_checkpoint(run_dir: Path) -> None:
    body = """
    checkpoint(attempt * 250)
    if attempt < 4 and index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(76 if attempt < 4 else 0)
    """
    code, _, stderr = finish(start(run_dir, body, num_workers=2, max_restarts=3))
    assert code == 0
    assert [line for line in stderr.splitlines() if "restart" in line] == [
        f"launch: restart {number} of 3 from checkpoint step {number * 250}" for number in (1, 2, 3)
    ]
    ports = [address for start in starts(run_dir, 0) for address in start["cluster"]["cluster"]["worker"]]
    assert len(ports) == len(set(ports)) == 8


def test_restarts_without_progress_end(run_dir: Path) -> None:
    body = """
    checkpoint(10)
    sys.exit(1)
    """
    code, _, stderr = finish(start(run_dir, body, num_workers=1, max_restarts=9))
    assert code == 1
    assert len(starts(run_dir, 0)) == 3  # the first one made a checkpoint, the two after it none
    assert stderr.splitlines()[-1] == (
        "launch: giving up, two attempts in a row made no new checkpoint; "
        f"the newest checkpoint is that of step 10; resume with --run_dir {run_dir}"
    )


def restarts_told(stderr: str) -> list[str]:
    return re.findall(r"^launch: (restart .*)$", stderr, re.MULTILINE)


def test_kills_before_the_first_checkpoint_do_not_end_the_job(run_dir: Path) -> None:
    body = """
    if attempt < 4:
        os.kill(os.getpid(), signal.SIGKILL if index == 1 else signal.SIGTERM)
    """
    code, _, stderr = finish(start(run_dir, body, num_workers=2, max_restarts=10))
    assert code == 0
    assert restarts_told(stderr) == [
        f"restart {number} of 10 in {pause} s from the beginning: there is no checkpoint yet"
        for number, pause in ((1, 1), (2, 2), (3, 4))
    ]


def test_lost_peers_and_failures_beside_a_kill_are_not_the_jobs_own(run_dir: Path) -> None:
    body = """
    if attempt == 1:
        sys.exit(76)
    if attempt == 2:
        os.kill(os.getpid(), signal.SIGKILL) if index == 0 else sys.exit(1)
    if attempt == 3:
        sys.exit(1)
    """
    code, _, stderr = finish(start(run_dir, body, num_workers=2, max_restarts=10))
    assert code == 0
    assert len(restarts_told(stderr)) == 3


@pytest.mark.parametrize("crash", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"])
def test_a_crash_is_a_failure_of_the_jobs_own(run_dir: Path, crash: str) -> None:
    body = f"""
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.{crash}) if index == 1 else sys.exit(76)
    """
    code, _, stderr = finish(start(run_dir, body, num_workers=2, max_restarts=10))
    assert code == 1
    assert len(starts(run_dir, 0)) == 2
    assert "launch: giving up, two attempts in a row made no new checkpoint; there is no checkpoint yet" in stderr


def test_the_pause_grows_up_to_a_limit_and_a_checkpoint_ends_it() -> None:
    history, pauses = restarts.History(newest=0), []
    for _ in range(8):
        history.note([-9, 76], newest=0)
        pauses.append(history.pause_seconds)
        assert history.reason_to_end(10, 76, stopping=False) is None
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    history.note([-9, 76], newest=250)
    assert history.pause_seconds == 0
    assert history.announcement(10) == "restart 9 of 10 from checkpoint step 250"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_pause_at_once(run_dir: Path, number: signal.Signals) -> None:
    job = start(run_dir, "os.kill(os.getpid(), signal.SIGKILL)", num_workers=1, max_restarts=20)
    assert job.stderr is not None
    while "restart 4 of 20 in 8 s" not in job.stderr.readline():
        assert job.poll() is None
    asked = time.monotonic()
    job.send_signal(number)
    code, _, stderr = finish(job)
    assert time.monotonic() - asked < 4
    assert code == 75
    assert stderr.splitlines()[-1] == (
        f"launch: stopped on request; there is no checkpoint yet; resume with --run_dir {run_dir}"
    )
    assert len(starts(run_dir, 0)) == 4


def test_restarts_run_out(run_dir: Path) -> None:
    code, _, stderr = finish(start(run_dir, "checkpoint(attempt); sys.exit(76)", num_workers=1, max_restarts=2))
    assert code == 76
    assert len(starts(run_dir, 0)) == 3
    assert "launch: giving up after 2 restarts; the newest checkpoint is that of step 3" in stderr


def test_half_written_and_damaged_checkpoints_do_not_count(tmp_path: Path) -> None:
    for name in ("step_00000250", ".step_00000500.tmp", "step_00000750.damaged", ".step_00000125.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert launch.newest_step(tmp_path) == 250
    assert launch.newest_step(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("heeds", "last"), [("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))", "SIGTERM"), ("", "SIGKILL")]
)
def test_a_worker_that_outlives_a_failure_is_ended_after_the_grace(run_dir: Path, heeds: str, last: str) -> None:
    body = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    {heeds}
    (run_dir / f"ready{{index}}").touch()
    if index == 0:
        wait_for((run_dir / "ready1").exists)
        sys.exit(76)
    time.sleep(1000)
    """
    started = time.monotonic()
    code, _, stderr = finish(start(run_dir, body, num_workers=2, grace_seconds=0.5))
    assert code == 76
    assert re.findall(r"worker 1 \(pid \d+\) is still running; sending it (SIG\w+)", stderr)[-1] == last
    assert time.monotonic() - started < 0.5 + launch.TERM_SECONDS + 5


# --- Signals ---------------------------------------------------------------------------------------

COUNTS_SIGNALS = """
received = []
def note(number, frame):
    received.append(number)
    (run_dir / f"received{index}").write_text(" ".join(map(str, received)))
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGHUP, note)
(run_dir / f"ready{index}").touch()
wait_for(lambda: received)
time.sleep(0.5)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_worker_once_and_ends_the_job(run_dir: Path, number: signal.Signals) -> None:
    job = start(run_dir, COUNTS_SIGNALS, num_workers=3, max_restarts=3)
    ready(run_dir, 3)
    job.send_signal(number)
    code, _, stderr = finish(job)
    assert code == 75
    assert [(run_dir / f"received{index}").read_text() for index in range(3)] == [str(int(number))] * 3
    assert f"launch: {number.name}: passed on to 3 workers\n" in stderr
    assert "launch: stopped on request; there is no checkpoint yet; resume with" in stderr


def test_a_terminal_that_is_lost_stops_the_job_unless_nohup_says_otherwise(run_dir: Path) -> None:
    body = """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    (run_dir / f"ready{index}").write_text(str(ignored))
    wait_for((run_dir / "go").exists)
    """
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = start(run_dir, body, num_workers=2)
    finally:
        signal.signal(signal.SIGHUP, handler)
    ready(run_dir, 2)
    job.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    (run_dir / "go").touch()
    code, _, stderr = finish(job)
    assert code == 0
    assert "SIGHUP" not in stderr
    assert [(run_dir / f"ready{index}").read_text() for index in range(2)] == ["True", "True"]


def test_a_second_signal_is_passed_on_too(run_dir: Path) -> None:
    body = COUNTS_SIGNALS.replace("wait_for(lambda: received)", "wait_for(lambda: len(received) == 2)")
    job = start(run_dir, body, num_workers=2)
    ready(run_dir, 2)
    job.send_signal(signal.SIGTERM)
    wait_until(lambda: all((run_dir / f"received{index}").exists() for index in range(2)))
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 75


def test_a_stop_before_the_workers_can_heed_it_is_no_failure(run_dir: Path) -> None:
    body = """
    (run_dir / f"ready{index}").touch()
    time.sleep(1000)
    """
    job = start(run_dir, body, num_workers=2, max_restarts=3)
    ready(run_dir, 2)
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 75
    assert len(starts(run_dir, 0)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_the_workers_die_with_the_launcher(run_dir: Path) -> None:
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run_dir / f"ready{index}").touch()
    time.sleep(1000)
    """
    job = start(run_dir, body, num_workers=2)
    ready(run_dir, 2)
    job.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids(run_dir)))
    job.communicate(timeout=LIMIT)


def test_a_child_that_a_worker_leaves_behind_does_not_hold_the_job(run_dir: Path) -> None:
    body = """
    import subprocess
    child = subprocess.Popen(["sleep", "1000"])
    with starts.open("a") as file:
        file.write(json.dumps({"pid": child.pid}) + "\\n")
    """
    code, _, _ = finish(start(run_dir, body, num_workers=1))
    assert code == 0
    wait_until(lambda: not any(alive(pid) for pid in pids(run_dir)))


# --- The command -----------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m tfdp.launch` where neither it nor a worker could load TensorFlow."""
    (folder / "tensorflow.py").write_text("raise ImportError('tensorflow must not be loaded here')\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    line = [sys.executable, "-m", "tfdp.launch", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_workers", "0"], r"num_workers \(0\) must be at least 1: try 2"),
        (
            ["--numworkers", "2"],
            r"unknown key numworkers on the command line: did you mean num_workers\?; .* after --, .*",
        ),
        (["--training.steps", "2"], r"unknown key training\.steps .*; arguments of tfdp\.train go after --, .*"),
        (["--num_workers", "2", "foo"], "unrecognized arguments: foo"),
        (["--num_workers", "1000000"], r"num_workers \(1000000\) must be at most 256 on one machine: .*"),
        (["--max_restarts", "-1", "--"], r"max_restarts \(-1\) must not be negative: try 0"),
        (["--num_workers", "2", "--", "--model.num_heads", "3"], r"model\.num_heads \(3\) must divide .*: try 2"),
        (
            ["--num_workers", "2", "--", "--config", "none.yaml"],
            r"--config \(none\.yaml\) must be an existing YAML file",
        ),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = command(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_help_shows_units_and_defaults(tmp_path: Path) -> None:
    result = command(tmp_path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())
    assert "-- --training.steps 100" in words
    assert "Seconds that the other workers have" in words and "default: 15.0)" in words


def test_print_config_of_the_workers_is_printed_once(tmp_path: Path) -> None:
    result = command(tmp_path, "--num_workers", "2", "--", "--seed", "5", "--print_config")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("seed: 5\n") == 1


def test_a_recipe_runs_in_every_worker_in_one_run_directory(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(
        "from dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    trainer: str = 'mine.recipe'\n"
        "    run_dir: str | None = None\n\n\n"
        "def train(config):\n"
        "    print(config.run_dir)\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "recipe.py").rename(tmp_path / "mine" / "recipe.py")
    (tmp_path / "a.yaml").write_text("run_dir: here\ntrainer: mine.recipe\n")
    arguments = ["--num_workers", "2", "--", "--trainer", "mine.recipe"]
    named = launched_names(tmp_path, *arguments)
    assert len(named) == 1 and re.fullmatch(r"runs/\d{8}-\d{6}", named.pop())
    assert launched_names(tmp_path, "--num_workers", "2", "--", "--config", "a.yaml") == {"here"}
    assert launched_names(tmp_path, *arguments, "--run_dir", "there", "--config", "a.yaml") == {"there"}


def launched_names(folder: Path, *arguments: str) -> set[str]:
    """The run directories that two workers of `mine.recipe` print."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    line = [sys.executable, "-m", "tfdp.launch", *arguments]
    result = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 0, result.stderr
    names = dict(line.split("] ") for line in result.stdout.splitlines())
    assert set(names) == {"[worker 0", "[worker 1"}
    return set(names.values())
