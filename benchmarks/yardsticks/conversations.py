"""Conversations about functions: `python benchmarks/yardsticks/conversations.py data --output DIR`.

    data   writes train.jsonl, valid.jsonl and test.jsonl: {"messages": [{"role": "user", "content": "..."}, ...]}

Two turns on each documented function of the standard library of the Python that runs this. What it does is the first
line of its docstring, which a small model guesses from the name; what its arguments are stands in the question before,
so a model that reads the conversation gets it right:

    user       What does posixpath.join(a, *p) do?
    assistant  Join two or more pathname components.
    user       What are its arguments?
    assistant  a and p.

Split by module, as the summaries are (`summaries.py`, which says why).
"""

import ast
import platform
from pathlib import Path

import summaries
from splits import Record, add_data, canonical, commands, drop_shared, split, write


def conversation(record: Record) -> Record | None:
    """The two turns on a function; None where its source does not stand alone."""
    try:
        node = ast.parse(record["code"]).body[0]
    except SyntaxError:
        return None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    given = node.args
    every = (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
    names = [each.arg for each in every if each and each.arg not in ("self", "cls")]
    listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
    turns = (
        f"What does {record['module']}.{node.name}({', '.join(names)}) do?",
        record["summary"].rstrip(".") + ".",
        "What are its arguments?",
        f"{listed or 'It has none'}.",
    )
    messages = [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(turns)]
    return {"messages": messages, "module": record["module"], "summary": record["summary"], "question": turns[0]}


def make_data(output: Path) -> None:
    found = [made for record in summaries.distinct(summaries.standard_library()) if (made := conversation(record))]
    parts = split(found, lambda record: record["module"], test=0.1, valid=0.05)
    dropped = drop_shared(parts, lambda record: [canonical(record["summary"])])
    print(f"Python {platform.python_version()}, under the PSF licence; {dropped:,} taken out of train as on both sides")
    write(output, parts, ("question", "summary"))


def main() -> None:
    parser, subcommands = commands(__doc__)
    add_data(subcommands)
    make_data(parser.parse_args().output)


if __name__ == "__main__":
    main()
