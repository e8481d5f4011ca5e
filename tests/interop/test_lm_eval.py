"""lm-eval on a run, beside its `hf` model on the export of the run: the same numbers for each request."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tfdp

pytest.importorskip("lm_eval", reason="needs pip install 'tfdp[peers]'")
pytest.importorskip("transformers", reason="needs pip install 'tfdp[peers]'")

pytestmark = [pytest.mark.peers, pytest.mark.timeout(280)]

TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "perplexity": """
task: perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "text": """
task: text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/texts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def evaluate(folder: Path, name: str, *arguments: str) -> dict[str, list[Any]]:
    """What lm-eval got for each request of each task."""
    line = [sys.executable, "-m", *arguments, "--tasks", ",".join(TASKS), "--include_path", "tasks"]
    line += ["--log_samples", "--output_path", name, "--batch_size", "4"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[Any]] = {}
    for task in TASKS:
        (path,) = (folder / name).rglob(f"samples_{task}_*.jsonl")
        rows = sorted((json.loads(row) for row in path.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[task] = [row["resps"] for row in rows]
    return found


def test_each_request_has_the_likelihood_and_the_text_of_hf(tmp_path: Path, corpus_dir: Path) -> None:
    tfdp.train(
        run_dir=str(tmp_path / "run"),
        data={"source": f"text:{corpus_dir}/*.txt", "validation_fraction": 0.2},
        model={"num_layers": 2, "context_length": 48},
        training={"steps": 40, "sample_tokens": 0},
    )
    tfdp.load(str(tmp_path / "run")).export(str(tmp_path / "exported"))
    (tmp_path / "tasks").mkdir()
    for task, text in TASKS.items():
        (tmp_path / "tasks" / f"{task}.yaml").write_text(text.replace("DATA", str(tmp_path)))
    words = ["alpha", "beta", "gamma", "delta", "return"]
    choices = [{"start": f"{a} {b} ", "ends": [a, b, "x" * 44], "label": 0} for a in words for b in words[:3]]
    texts = [{"start": f"{a} {b}", "text": f"{a} {b} " * size} for size, (a, b) in enumerate(pairwise(words), 1)]
    for name, rows in (("choice", choices), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ours = evaluate(tmp_path, "ours", "tfdp.lm_eval", "--model", "tfdp", "--model_args", "path=run")
    theirs = evaluate(
        tmp_path, "hf", "lm_eval", "--model", "hf", "--model_args", "pretrained=exported", "--device", "cpu"
    )
    for task in ("choice", "perplexity"):
        for own, other in zip(ours[task], theirs[task], strict=True):
            for (mine,), (their,) in zip(own, other, strict=True):
                mine, their = (each if isinstance(each, list) else [each] for each in (mine, their))
                assert float(mine[0]) == pytest.approx(float(their[0]), abs=1e-4)
                assert mine[1:] == their[1:]
    assert ours["text"] == theirs["text"]
