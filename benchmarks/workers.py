"""What two workers on one machine cost: `python benchmarks/workers.py [PRECISION ...] [--KEY=VALUE ...]`.

The `baby` shape, 8 sequences a step, in processes of its own that take turns: one process with all cores; two workers
with half of the cores each; and the same two with no reduction, each training by itself on half of the batch. Keys and
values (`--distribution.wire_dtype=bfloat16`) are for the two workers.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tfdp.benchmarking import own
from tfdp.benchmarking.running import Running
from tfdp.benchmarking.shapes import SHAPES
from tfdp.config.parsing import load, to_yaml
from tfdp.config.sections import OptimizerConfig
from tfdp.recipe import import_recipe

ROUNDS, ROUND_SECONDS = 9, 2.0


def main() -> None:
    options = [word for word in sys.argv[1:] if word.startswith("--")]
    precisions = [word for word in sys.argv[1:] if not word.startswith("--")]
    shape = SHAPES["baby"]
    recipe = import_recipe("causal_lm")
    for precision in precisions or ("float32", "bfloat16"):
        batch = ["--training.global_batch_size", str(shape.num_rows), f"--training.precision={precision}"]
        config = load(recipe.Config, [*batch, *options], "benchmarks/workers.py", "")
        config = replace(config, model=own.model_config(shape), optimizer=OptimizerConfig(name="adamw"))
        half = replace(config.training, global_batch_size=shape.num_rows // 2)
        with tempfile.TemporaryDirectory() as folder:
            whole_path, half_path = Path(folder, "whole.yaml"), Path(folder, "half.yaml")
            whole_path.write_text(to_yaml(config), encoding="utf-8")
            half_path.write_text(to_yaml(replace(config, training=half)), encoding="utf-8")
            whole, halves = (["tfdp.benchmarking.planned", str(path), "65"] for path in (whole_path, half_path))
            one = Running("one process", whole)
            two = Running("two workers", whole, num_workers=2)
            apart = Running("two apart", halves, num_workers=2, together=False)
        running = (one, two, apart)
        for each in running:
            each.settle(ROUND_SECONDS)
        for _ in range(ROUNDS):
            for each in running:
                each.round()
        seconds = [each.median_seconds for each in running]
        for each in running:
            each.end()
        print(
            f"{precision}: one process {seconds[0]:.3f} s, two workers {seconds[1]:.3f} s, apart {seconds[2]:.3f} s; "
            f"the workers run at {seconds[0] / seconds[1]:.2f} of one, {seconds[2] / seconds[1]:.2f} of two apart",
            flush=True,
        )


if __name__ == "__main__":
    main()
