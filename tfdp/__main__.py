"""Lists the commands: `python -m tfdp`."""

import ast
from pathlib import Path

COMMANDS = (
    "train",
    "evaluate",
    "generate",
    "chat",
    "export",
    "predict",
    "prepare",
    "launch",
    "replay",
    "plan",
    "benchmark",
    "lm_eval",
)


def main() -> None:
    print("tfdp trains GPT language models with data parallelism on TensorFlow and Keras 3.\n")
    for name in COMMANDS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")  # importing them takes longer
        summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        print(f"  python -m tfdp.{name:<10} {summary.partition(': `')[0].rstrip('.')}")
    print("\nEach has --help. The first run needs nothing: python -m tfdp.train")


if __name__ == "__main__":
    main()
