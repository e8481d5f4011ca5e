"""What a function does, in a line: `python benchmarks/yardsticks/summaries.py data --output DIR`.

    data   writes train.jsonl, valid.jsonl and test.jsonl: {"code": "def f(x): ...", "summary": "Return ..."}
    lead   --test FILE: ROUGE of what needs no model, such as the words of the function's name
    score  --predictions FILE --test FILE: ROUGE of predictions

Functions of the standard library of the Python that runs this, without their docstring, and the docstring's first line;
so the files differ between versions of Python, and results name theirs. Tests are left out. `--more` adds functions of
pinned packages to train alone; the test file stays the same.

Split by module, not by function: methods of one class repeat each other's words, and half of them in training would
give away the rest. After that, train loses what has the summary or the code of a held-out function, as `_pyio` has
those of `io`. A summary has 3 to 25 words, code at most 1,200 characters.
"""

import ast
import io
import platform
import re
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from scores import report, rouge
from splits import (
    Record,
    add_data,
    add_score,
    canonical,
    commands,
    drop_shared,
    fetch,
    members,
    read,
    read_outputs,
    split,
    write,
)

MORE = ("sympy==1.13.3", "networkx==3.4.2", "Django==5.2.19", "pandas==2.2.3", "matplotlib==3.10.0", "scipy==1.15.0")
LONGEST = 1200  # characters of code
LEFT_OUT = {"site-packages", "dist-packages", "lib2to3", "test", "tests", "idle_test", "__pycache__", "testing"}


def without_docstring(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The source of a function without the lines of its docstring; none where these hold other code too."""
    first, last = node.body[0].lineno, node.body[0].end_lineno or 0
    if len(node.body) < 2 or first <= node.lineno or node.body[1].lineno <= last:
        return None
    return dedent("\n".join(lines[node.lineno - 1 : first - 1] + lines[last : node.end_lineno])).strip()


def functions(source: str, module: str) -> Iterator[Record]:
    """The documented functions of a module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            code = without_docstring(lines, node)
            summary = " ".join(text.splitlines()[0].split())
            if code and len(code) <= LONGEST and 3 <= len(summary.split()) <= 25:
                yield {"code": code, "summary": summary, "module": module}


def standard_library() -> Iterator[Record]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            yield from functions(path.read_bytes().decode("utf-8", "replace"), ".".join(parts))


def packages(archives: list[Path]) -> Iterator[Record]:
    for archive in archives:
        for name, content in members(archive, r"\.py$"):
            if LEFT_OUT.isdisjoint(Path(name).parts):
                yield from functions(content.decode("utf-8", "replace"), name)


def keys(record: Record) -> tuple[str, str]:
    return "summary " + canonical(record["summary"]), "code " + canonical(record["code"])


def distinct(records: Iterator[Record]) -> list[Record]:
    """Each code once, the first of equal ones."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(canonical(record["code"]), record)
    return list(found.values())


def make_data(archives: list[Path], more: bool, output: Path) -> None:
    parts = split(distinct(standard_library()), lambda record: record["module"], test=0.15, valid=0.05)
    with tempfile.TemporaryDirectory() as scratch:
        archives = archives + ([fetch(name, Path(scratch)) for name in MORE] if more else [])
        parts["train"] = distinct(iter(parts["train"] + list(packages(archives))))
    dropped = drop_shared(parts, keys)
    print(f"Python {platform.python_version()}, under the PSF licence; {dropped:,} taken out of train as on both sides")
    write(output, parts, ("code", "summary"))


def words(name: str) -> list[str]:
    """`get_HTTPValue` as get http value."""
    return re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", " ", name).lower().split()


def by_name(code: str) -> str:
    return " ".join(words(re.search(r"def\s+(\w+)", code)[1]))  # type: ignore[index]


def by_signature(code: str) -> str:
    """The name, then the names of the arguments."""
    node = ast.parse(code).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    given = [each.arg for each in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
    return " ".join([by_name(code), *(word for name in given if name not in ("self", "cls") for word in words(name))])


def by_comment(code: str) -> str:
    """The first comment, or the name where there is none."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    found = [token.string.lstrip("#! ") for token in tokens if token.type == tokenize.COMMENT]
    return found[0] if found else by_name(code)


def returns(code: str) -> bool:
    return any(isinstance(node, ast.Return) and node.value for node in ast.walk(ast.parse(code)))


def by_return(code: str) -> str:
    """The signature after `Return the` or `the`: most summaries of functions with a value begin so."""
    return ("return the " if returns(code) else "the ") + by_signature(code)


def by_padding(code: str) -> str:
    """The same with words that nearly every summary has; it says less and scores more, which is a flaw of ROUGE."""
    return ("return the a of " if returns(code) else "the a of ") + by_signature(code)


LEADS = {
    "name": by_name,
    "signature": by_signature,
    "comment": by_comment,
    "return": by_return,
    "padding": by_padding,
}


def score(outputs: list[str], tests: list[Record]) -> dict[str, float]:
    """Prints and returns the mean F-measures of ROUGE."""
    return {kind: report(kind, parts) for kind, parts in rouge(outputs, [each["summary"] for each in tests]).items()}


def main() -> None:
    parser, subcommands = commands(__doc__)
    data = add_data(subcommands)
    data.add_argument("--package", type=Path, nargs="+", default=[], help="packages with more functions, for train")
    data.add_argument("--more", action="store_true", help=f"download packages for train: {', '.join(MORE)}")
    lead = subcommands.add_parser("lead", help="ROUGE without a model")
    lead.add_argument(
        "--kind", choices=LEADS, default="return", help="default: return, on valid.jsonl the best but for padding"
    )
    lead.add_argument("--test", type=Path, required=True, help="test.jsonl of `data`")
    add_score(subcommands, "ROUGE of predictions")
    arguments = parser.parse_args()
    if arguments.command == "data":
        make_data(arguments.package, arguments.more, arguments.output)
        return
    tests = read(arguments.test, "code", "summary")
    if arguments.command == "lead":
        score([LEADS[arguments.kind](record["code"]) for record in tests], tests)
    else:
        score(read_outputs(arguments.predictions, len(tests)), tests)


if __name__ == "__main__":
    main()
