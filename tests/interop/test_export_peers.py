"""An exported run in transformers: its validation loss and its greedy text, for each tokenizer that is exported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfdp.inference.trained import TrainedModel

torch = pytest.importorskip("torch", reason="needs pip install 'tfdp[peers]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'tfdp[peers]'")

pytestmark = [pytest.mark.peers, pytest.mark.timeout(280)]


def tfdp(folder: Path, command: str, *arguments: str) -> str:
    line = [sys.executable, "-m", f"tfdp.{command}", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_transformers_has_the_loss_and_the_greedy_text_of_the_run(
    tokenizer: str, tmp_path: Path, corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(corpus_dir, tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    text = ["--data.source=text:text/*.txt", "--data.validation_fraction=0.2", f"--data.tokenizer={tokenizer}"]
    size = ["--model.num_layers=2", "--training.steps=30", "--training.sample_tokens=0"]
    tfdp(tmp_path, "train", "--run_dir=run", *text, *size, "--data.cache_dir=cache")
    tfdp(tmp_path, "export", "--run_dir=run", "--output=exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")

    trained = TrainedModel.open(str(tmp_path / "run"), "best", "compared")
    from tfdp.data import sources
    from tfdp.data.sequences import PackedSequences

    config = trained.config
    corpus = sources.open_corpus(config.data, tmp_path / "cache")
    sequences = PackedSequences(corpus.sources[0].shards.validation, config.model.context_length)
    rows = sequences.rows(np.arange(sequences.num_sequences))
    total = count = 0.0
    for row in rows:
        tokens = torch.from_numpy(row[row >= 0].astype(np.int64))
        logits = model(tokens[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").detach())
        count += len(tokens) - 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert total / count == pytest.approx(summary["validation_loss"], rel=1e-5)

    for sample in ("alpha beta", "été\n", "", "x<|endo y"):
        ids = theirs(sample).input_ids
        assert ids == [trained.tokenizer.end_of_text, *trained.tokenizer.encode(sample).tolist()]
        assert theirs.decode(ids, skip_special_tokens=True) == sample
    ids = theirs("alpha ", return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=64, do_sample=False, pad_token_id=theirs.eos_token_id)
    ours = tfdp(tmp_path, "generate", "--run_dir=run", "--prompt=alpha ", "--num_tokens=64", "--temperature=0")
    assert theirs.decode(made[0], skip_special_tokens=True) == ours.removesuffix("\n")
