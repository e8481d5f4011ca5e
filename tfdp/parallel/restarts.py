"""Whether a job is restarted once its workers have ended, and its exit code otherwise."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from tfdp.system import exits

LONGEST_PAUSE_SECONDS = 30.0  # before a restart, however many attempts have made no checkpoint

_KILLS = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}  # from outside; all others are crashes


@dataclass
class History:
    """The outcomes of the attempts of a job, which decide whether there is another one."""

    newest: int  # step of the newest checkpoint
    num_attempts: int = 0
    num_without_checkpoint: int = 0  # attempts since the newest checkpoint
    num_failures: int = 0  # those of them that failed by themselves, not by a kill or a lost peer

    def note(self, codes: Sequence[int], newest: int) -> None:
        """Notes that an attempt has ended with these codes of its workers, and the newest checkpoint after it."""
        self.num_attempts += 1
        if newest > self.newest:
            self.newest, self.num_without_checkpoint, self.num_failures = newest, 0, 0
            return
        self.num_without_checkpoint += 1
        self.num_failures += failed_by_itself(codes)

    def reason_to_end(self, max_restarts: int, code: int, stopping: bool) -> str | None:
        """Why a job that has not finished is not started again; None if it is."""
        if stopping or code == exits.STOPPED:
            return "stopped on request"
        num_restarts = self.num_attempts - 1
        if num_restarts == max_restarts:
            return f"giving up after {num_restarts} restarts" if num_restarts else "the job failed, --max_restarts is 0"
        if self.num_failures >= 2:
            return "giving up, two attempts in a row made no new checkpoint"
        return None

    @property
    def pause_seconds(self) -> float:
        """Before the next attempt: none after a new checkpoint, else 1, 2, 4, ..."""
        doublings = min(self.num_without_checkpoint - 1, 10)
        return min(2.0**doublings, LONGEST_PAUSE_SECONDS) if self.num_without_checkpoint else 0.0

    def announcement(self, max_restarts: int) -> str:
        pause = f"in {self.pause_seconds:g} s " if self.pause_seconds else ""
        return f"restart {self.num_attempts} of {max_restarts} {pause}{_origin(self.newest)}"


def failed_by_itself(codes: Sequence[int]) -> bool:
    """Whether the job failed by its own fault: a worker failed or crashed, and none was killed from outside.

    A kill may make the other workers fail in any way.
    """
    return job_code(codes, stopping=False) == exits.FAILED and not _KILLS.intersection(codes)


def job_code(codes: Sequence[int], stopping: bool) -> int:
    """The exit code of the job from those of its workers, where minus a number is the signal that killed one.

    A crash, such as SIGSEGV, is a failure of the program, unless another worker was killed from outside: TensorFlow may
    abort a worker whose peer is gone.
    """
    if not any(codes):
        return exits.FINISHED
    if exits.USER_ERROR in codes:
        return exits.USER_ERROR
    failed = any(code > 0 and code not in (exits.STOPPED, exits.PEER_LOST) for code in codes)
    crashed = any(code < 0 and code not in _KILLS for code in codes)
    if failed or (crashed and not _KILLS.intersection(codes)):
        return exits.FAILED
    return exits.STOPPED if stopping or exits.STOPPED in codes else exits.PEER_LOST


def whereabouts(step: int) -> str:
    """The checkpoint to resume from, for messages: that of this step, 0 for none."""
    return f"the newest checkpoint is that of step {step}" if step else "there is no checkpoint yet"


def _origin(step: int) -> str:
    return f"from checkpoint step {step}" if step else "from the beginning: there is no checkpoint yet"
