"""How a command ends: exit codes, and the exceptions that carry them to one line on stderr."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tfdp.system import console
from tfdp.system.messages import one_line, shown
from tfdp.system.startup import choose_keras

FINISHED, FAILED, USER_ERROR, STOPPED, PEER_LOST = 0, 1, 2, 75, 76


class CommandError(Exception):
    """Ends a command with one line on stderr and `exit_code`, without a traceback."""

    exit_code = FAILED

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # whatever the values in it hold


class ConfigError(CommandError, ValueError):
    """A mistake of the user, reported in one line: key, value, rule, fix."""

    exit_code = USER_ERROR


class TrainingError(CommandError):
    """The run cannot continue, for a reason that the user should know, such as a gradient that is not finite."""


class StopRequested(CommandError):
    """The run stopped because it was asked to; a checkpoint is saved."""

    exit_code = STOPPED


class PeerLost(CommandError):
    """Another worker died, stalled or was cut off; the job can be restarted."""

    exit_code = PEER_LOST


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask to stop: SIGINT, SIGTERM, and SIGHUP, the loss of the terminal, unless nohup ignores it."""
    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


def end(code: int) -> NoReturn:
    """Ends the process at once, without the exit handlers of the libraries it has loaded."""
    console.flush()
    os._exit(code)


def leave(error: CommandError) -> NoReturn:
    """Ends the process at once, from any thread, with the error's line and code.

    TensorFlow's own way out would wait for a peer that is gone. The pause lets the other workers find out
    which peer was lost before this one is gone too.
    """
    _report(error)
    if isinstance(error, PeerLost):
        time.sleep(1.5)
    end(error.exit_code)


def run_command(command: Callable[[], None], output_is_result: bool = False) -> int:
    """Runs a command's body and turns the exceptions above into its exit code.

    Args:
      output_is_result: whether a stdout that cannot be written ends the command. Otherwise its lines are only progress,
        and it continues.
    """
    console.prepare(output_is_result)
    choose_keras()
    try:
        _run(command)
    except PeerLost as error:
        leave(error)
    except CommandError as error:
        _report(error)
        return error.exit_code
    except console.OutputLost as error:
        if not error.is_closed:  # its reader is gone and wants no more
            _report(CommandError(str(error)))
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return FAILED
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            traceback.print_exc()
            return FAILED
        _report(ConfigError(f"{shown(Path(str(error.filename)))} is no name for a file: {error.strerror}"))
        return USER_ERROR
    except Exception:
        traceback.print_exc()
        return FAILED
    return FINISHED


def _run(command: Callable[[], None]) -> None:
    try:
        command()
    finally:
        console.flush()  # also after --help, which exits


def _report(error: CommandError) -> None:
    label = "stopped" if isinstance(error, StopRequested) else "error"
    print(f"{label}: {error}", file=sys.stderr, flush=True)


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raises `ConfigError` "key (value) rule" unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} ({shown(value)}) {rule}")


def require_at_most(config: object, section: str = "", **limits: float) -> None:
    """Raises `ConfigError` where a field of a section, such as "model.", is larger than its limit."""
    for name, limit in limits.items():
        value = getattr(config, name)
        require(value is None or not value > limit, f"{section}{name}", value, f"must be at most {limit:,}")
