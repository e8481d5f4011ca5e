"""How a command ends: its exit code and the one line on stderr."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from tfdp.system.exits import CommandError, ConfigError, StopRequested, TrainingError, run_command


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_a_command_that_returns_ends_with_0_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CommandError("no"), 1, "error: no\n"),
        (TrainingError("step 7: not finite"), 1, "error: step 7: not finite\n"),
        (ConfigError("seed (x) must be a whole number"), 2, "error: seed (x) must be a whole number\n"),
        (StopRequested("saved at step 12"), 75, "stopped: saved at step 12\n"),
    ],
)
def test_each_error_has_its_code_and_one_line_on_stderr(
    error: CommandError, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error)) == code
    assert capsys.readouterr() == ("", line)


def test_a_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="rule"):
        raise ConfigError("key (value) rule")


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug")])
def test_what_is_no_command_error_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(error)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == f"{type(error).__name__}: a bug"


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyboardInterrupt())) == 1
    assert capsys.readouterr().err == "interrupted\n"


def test_help_ends_as_it_wants() -> None:
    with pytest.raises(SystemExit):
        run_command(raising(SystemExit(0)))


@pytest.mark.parametrize(
    ("body", "code", "num_lines"),
    [
        ("pass", 0, 0),
        ("raise exits.ConfigError('k')", 2, 1),
        ("raise exits.StopRequested('k')", 75, 1),
        ("1 / 0", 1, 0),
    ],
)
def test_the_shell_sees_the_code(body: str, code: int, num_lines: int) -> None:
    program = f"import sys\nfrom tfdp.system import exits\ndef main():\n    {body}\nsys.exit(exits.run_command(main))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout == ""
    assert ("Traceback" in done.stderr) == (code == 1)
    assert code == 1 or len(done.stderr.splitlines()) == num_lines
