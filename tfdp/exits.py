"""How a command ends: exit codes, and the exceptions that carry them to one line on stderr."""

import sys
from collections.abc import Callable

FINISHED, FAILED, USER_ERROR, STOPPED, PEER_LOST = 0, 1, 2, 75, 76


class CommandError(Exception):
    """Ends a command with one line on stderr and `exit_code`, without a traceback."""

    exit_code = FAILED


class ConfigError(CommandError, ValueError):
    """A mistake of the user, told in one line: key, value, rule, fix."""

    exit_code = USER_ERROR


class TrainingError(CommandError):
    """The run cannot go on, and its user should know why: a gradient that is not finite, say."""


class StopRequested(CommandError):
    """The run stopped because it was asked to; a checkpoint is saved."""

    exit_code = STOPPED


def run_command(command: Callable[[], None]) -> int:
    """Runs a command's body and turns the exceptions above into its exit code."""
    try:
        command()
    except CommandError as error:
        label = "stopped" if isinstance(error, StopRequested) else "error"
        print(f"{label}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return FINISHED
