"""Runs lm-eval with tfdp's model among its own: `python -m tfdp.lm_eval --model tfdp --model_args path=DIR --tasks T`.

lm-eval (pip install lm-eval) has no entry point for models of other packages, so this registers ours, by name, and
hands the command line on.
"""

import importlib
import sys

from tfdp.system.exits import ConfigError, run_command


def main() -> None:
    try:
        registry = importlib.import_module("lm_eval.api.registry")
        command = importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        raise ConfigError(f"lm-eval must be installed: try pip install lm-eval ({error})") from None
    registry.model_registry.register("tfdp", target="tfdp.inference.lm_eval_model:TfdpLM")
    command.cli_evaluate()


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))
