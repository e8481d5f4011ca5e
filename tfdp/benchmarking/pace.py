"""How a measured process and `tfdp.benchmark` talk: numbers of steps on stdin, JSON objects on stdout.

The process trains one step and says so. Then each line holds a number of steps, answered by the seconds that one of
them took (a system may do more at once than it is asked for); `end` is answered by the peak of the memory, and ends the
process.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from tfdp.system.console import OutputLost
from tfdp.system.exits import FINISHED, end


class Pace:
    """Tells a system how many steps to train, and takes their time.

    Attributes:
      wanted: steps still to do before the next answer, at least 1.
      device_memory: where the device has a memory of its own, gives its peak in bytes.
      flops_per_second: the best so far, of a system that trains nothing; 0 for the others.
    """

    def __init__(self) -> None:
        self._output = os.dup(1)
        os.dup2(2, 1)  # whatever a library prints goes to stderr
        self.wanted = 1
        self.device_memory: Callable[[], int] | None = None
        self.flops_per_second = 0.0
        self._is_first, self._num_done, self._started = True, 0, 0.0

    def done(self, num_steps: int) -> None:
        """After so many steps are finished, on the device too; waits for the next line once all are done."""
        self.wanted -= num_steps
        self._num_done += num_steps
        if self.wanted > 0:
            return
        seconds = time.perf_counter() - self._started
        rates = {"flops_per_second": self.flops_per_second}
        self._answer({**rates, "seconds_of_step": seconds / self._num_done} if not self._is_first else rates)
        line = sys.stdin.readline().strip()
        if line in ("end", ""):
            self._answer({"peak_memory_bytes": self._peak_memory()})
            end(FINISHED)
        self.wanted, self._num_done, self._is_first = int(line), 0, False
        self._started = time.perf_counter()

    def _peak_memory(self) -> int:
        if self.device_memory is not None:
            return self.device_memory()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _answer(self, fields: dict[str, Any]) -> None:
        try:
            os.write(self._output, json.dumps(fields).encode() + b"\n")  # less than a pipe takes at once
        except OSError as error:
            raise OutputLost(error) from None
