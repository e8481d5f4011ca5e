"""One measured process: `python -m tfdp.systems SYSTEM SHAPE PRECISION NUM_REPLICAS`, started by `tfdp.benchmark`."""

import importlib
import sys

from tfdp.exits import ConfigError, run_command
from tfdp.systems import SYSTEMS
from tfdp.systems.pace import Pace
from tfdp.systems.shapes import SHAPES


def main() -> None:
    arguments = sys.argv[1:]
    right = len(arguments) == 4 and arguments[0] in SYSTEMS and arguments[1] in SHAPES and arguments[3].isdecimal()
    if not right:
        raise ConfigError(
            "tfdp.systems must be given SYSTEM SHAPE PRECISION NUM_REPLICAS: python -m tfdp.benchmark does"
        )
    system, shape, precision, num_replicas = arguments
    pace = Pace()
    module = {"tfdp": "own", "pytorch_ddp": "pytorch"}.get(system, system)
    importlib.import_module(f"tfdp.systems.{module}").run(SHAPES[shape], precision, int(num_replicas), pace)


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))
