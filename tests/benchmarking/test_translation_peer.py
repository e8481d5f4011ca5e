"""benchmarks/yardsticks/translation_peer.py: an encoder-decoder of transformers that trains and writes translations."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "yardsticks"

pytestmark = pytest.mark.peers


def test_it_learns_and_translates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import translation_peer

    numbers = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier"}
    pairs = [{"en": f"{a} and {b}", "de": f"{x} und {y}"} for a, x in numbers.items() for b, y in numbers.items()]
    for name in ("train", "valid", "test"):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    arguments = (
        f"--data {tmp_path} --output {tmp_path}/out --width 64 --encoder_layers 1 --decoder_layers 1 --steps 200"
    )
    more = (
        "--global_batch_size 16 --warmup_steps 10 --vocabulary 300 --learning_rate 0.003 --dropout 0 --num_examples 4"
    )
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split(), *more.split()])
    translation_peer.main()
    assert "trained" in capsys.readouterr().out
    for name in ("greedy", "beam4"):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["output"] for line in lines]
        assert found == ["eins und eins", "eins und zwei", "eins und drei", "eins und vier"]
