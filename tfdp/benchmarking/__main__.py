"""One measured process: `python -m tfdp.benchmarking SYSTEM SHAPE VARIANT NUM_REPLICAS`."""

import importlib
import sys

from tfdp.benchmarking import SYSTEMS
from tfdp.benchmarking.pace import Pace
from tfdp.benchmarking.shapes import SHAPES
from tfdp.system.exits import ConfigError, run_command


def main() -> None:
    arguments = sys.argv[1:]
    right = len(arguments) == 4 and arguments[0] in SYSTEMS and arguments[1] in SHAPES and arguments[3].isdecimal()
    if not right:
        raise ConfigError(
            "tfdp.benchmarking must be given SYSTEM SHAPE VARIANT NUM_REPLICAS: python -m tfdp.benchmark does"
        )
    system, shape, variant, num_replicas = arguments
    pace = Pace()
    module = {"tfdp": "own", "pytorch_ddp": "pytorch"}.get(system, system)
    importlib.import_module(f"tfdp.benchmarking.{module}").run(SHAPES[shape], variant, int(num_replicas), pace)


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))
