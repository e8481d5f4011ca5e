"""One measured process: `python -m tfdp.systems SYSTEM SHAPE PRECISION NUM_REPLICAS`, started by `tfdp.benchmark`."""

import importlib
import sys

from tfdp.systems.pace import Pace
from tfdp.systems.shapes import SHAPES


def main() -> None:
    system, shape, precision, num_replicas = sys.argv[1:]
    pace = Pace()
    module = {"tfdp": "own", "pytorch_ddp": "pytorch"}.get(system, system)
    importlib.import_module(f"tfdp.systems.{module}").run(SHAPES[shape], precision, int(num_replicas), pace)


if __name__ == "__main__":
    main()
