"""What `training.remat` saves and costs: `python benchmarks/remat.py [ROUNDS]`.

12 layers, 256 wide, 8 heads, context 256, float32 and bfloat16, in processes of their own that take turns. Activation
memory is what four times as many rows add to the peak of a process.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tfdp.benchmarking.running import Running
from tfdp.config.parsing import to_yaml
from tfdp.config.sections import DataConfig, ModelConfig, OptimizerConfig
from tfdp.recipe import import_recipe


def main() -> None:
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    base = import_recipe("causal_lm").Config(
        model=ModelConfig(num_layers=12, model_dim=256, num_heads=8, context_length=256),
        data=DataConfig(),
        optimizer=OptimizerConfig(name="adamw"),
    )
    for precision in ("float32", "bfloat16"):
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for remat in (False, True):
                for rows in (2, 8):
                    training = replace(
                        base.training, precision=precision, remat=remat, global_batch_size=rows, evaluation_rows=1
                    )
                    path = Path(folder, f"{remat}-{rows}.yaml")
                    path.write_text(to_yaml(replace(base, training=training)), encoding="utf-8")
                    found[remat, rows] = Running(path.stem, ["tfdp.benchmarking.planned", str(path), "256"])
                    found[remat, rows].settle(1.0)
        for _ in range(num_rounds):
            for each in found.values():
                each.round()
        seconds = {key: each.median_seconds for key, each in found.items()}
        peaks = {key: each.end() for key, each in found.items()}
        added = {remat: peaks[remat, 8] - peaks[remat, 2] for remat in (False, True)}
        megabytes = [f"{count / 1e6:,.0f}" for count in (added[False], added[True], peaks[False, 8], peaks[True, 8])]
        print(
            "{}: activations of 6 more rows {} MB, with remat {} MB: {:.2f}; peak {} and {} MB; ".format(
                precision, *megabytes[:2], added[True] / added[False], *megabytes[2:]
            )
            + f"time {seconds[False, 8]:.3f} and {seconds[True, 8]:.3f} s: {seconds[True, 8] / seconds[False, 8]:.2f}"
        )


if __name__ == "__main__":
    main()
