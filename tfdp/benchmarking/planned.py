"""The run of a configuration on tokens drawn at random, for `tfdp.plan`:
`python -m tfdp.benchmarking.planned CONFIG.yaml VOCAB_SIZE`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.benchmarking import own
from tfdp.benchmarking.pace import Pace
from tfdp.recipe import FUNCTIONS, recipe_of_file
from tfdp.system.exits import run_command
from tfdp.system.startup import load_tensorflow
from tfdp.training.weights import snapshot


def main() -> None:
    path, vocab_size = Path(sys.argv[1]), int(sys.argv[2])
    pace = Pace()
    load_tensorflow()
    _, config = recipe_of_file(path, FUNCTIONS, "planned")
    rows = 2 * max(config.training.global_batch_size, config.training.rows_of_evaluation)
    ids = np.random.default_rng(0).integers(0, vocab_size, rows * config.model.context_length + 1, np.int32)
    own.train(config, ids, vocab_size, pace, prepare=_hold_what_a_run_holds)


def _hold_what_a_run_holds(components: Any) -> Any:
    """Evaluates, and copies the weights and the optimizer's state as a save does, which lasts while steps go on."""
    components.evaluator()
    return (*components.weights.snapshot(), snapshot(components.weights.average))


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))
