"""A run written as a folder of Hugging Face, and that folder trained on, evaluated and refused; no peers needed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import kill_a_worker

SIZE = ["--model.num_layers=2", "--model.num_heads=2", "--model.model_dim=32", "--model.context_length=32"]
SHORT = ["--training.steps=12", "--training.global_batch_size=8", "--training.sample_tokens=0"]
ADAPTERS = ["--model.init_from=exported", "--model.lora_rank=2", "--model.lora_dropout=0.1", "--training.log_every=1"]
TEXT = ["--data.source=text:text/*.txt", "--data.validation_fraction=0.2"]

pytestmark = pytest.mark.timeout(180)


def tfdp(folder: Path, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"tfdp.{command}", *map(str, arguments)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=150)


def summary(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Path:
    """With a run of the default model, small, and its export."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(corpus_dir, folder / "text")
    text = ["--data.source=text:text/*.txt", "--data.validation_fraction=0.2"]
    done = tfdp(folder, "train", "--run_dir=run", *text, *SIZE, *SHORT)
    assert done.returncode == 0, done.stderr
    done = tfdp(folder, "export", "--run_dir=run", "--output=exported")
    assert done.returncode == 0, done.stderr
    return folder


def test_an_export_says_what_it_is(folder: Path) -> None:
    files = {path.name for path in (folder / "exported").iterdir()}
    named = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert files == {*named, "model.safetensors"}
    config = json.loads((folder / "exported" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])  # whose QK gains are one
    assert config["eos_token_id"] == 255
    card = (folder / "exported" / "README.md").read_text()
    assert f"{summary(folder / 'run')['validation_loss']:.4f} nats per token" in card
    assert "text:text/*.txt" in card and str(folder) not in card


@pytest.mark.slow
def test_training_goes_on_from_an_export_and_from_a_run(folder: Path) -> None:
    """The first loss of both is the same, and that of a trained model; the tokenizer comes along."""
    first: dict[str, float] = {}
    for name, origin in (("from_folder", "exported"), ("from_run", "run")):
        text = ["--data.source=text:text/*.txt", "--data.validation_fraction=0.2", "--training.log_every=1"]
        done = tfdp(folder, "train", f"--run_dir={name}", f"--model.init_from={origin}", *text, *SHORT)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        first[name] = rows[0]["loss"]
        assert rows[0]["step"] == 1
    assert first["from_folder"] == pytest.approx(first["from_run"], rel=1e-6)
    assert first["from_run"] < 0.8 * np.log(256)
    replayed = tfdp(folder, "replay", "--run_dir=from_folder", "--step=3")  # from there too
    assert replayed.stdout.count("equal") == 2, replayed.stdout + replayed.stderr
    resumed = tfdp(folder, "train", "--run_dir=from_run", "--training.steps=16")
    assert resumed.returncode == 0, resumed.stderr
    assert summary(folder / "from_run")["step"] == 16


@pytest.mark.slow
def test_a_run_needs_the_folder_that_it_started_from_no_more(folder: Path) -> None:
    shutil.copytree(folder / "exported", folder / "passing")
    whole = ["--model.init_from=exported", *TEXT, *SHORT, "--optimizer.schedule_steps=12"]
    half = [*whole, "--training.steps=6", "--model.init_from=passing"]
    half.remove("--training.steps=12"), half.remove("--model.init_from=exported")
    for name, keys in (("stayed", whole), ("left", half)):
        done = tfdp(folder, "train", f"--run_dir={name}", *keys)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "passing")
    for command, own in (("generate", ["--num_tokens=4"]), ("evaluate", []), ("train", ["--training.steps=12"])):
        done = tfdp(folder, command, "--run_dir=left", *own)
        assert done.returncode == 0, done.stderr
    assert summary(folder / "left")["state_sha256"] == summary(folder / "stayed")["state_sha256"]
    mistyped = tfdp(folder, "train", "--run_dir=left", "--data.tokenizer=huggingface:exportde", "--training.steps=14")
    assert mistyped.returncode == 2 and "data.tokenizer (exportde)" in mistyped.stderr, mistyped.stderr
    anew = tfdp(folder, "train", "--run_dir=anew", *half)
    assert anew.returncode == 2 and "model.init_from (passing) must be a folder" in anew.stderr


@pytest.mark.slow
def test_adapters_that_peft_could_not_use_are_not_written(folder: Path) -> None:
    for name, origin in (
        ("on_run", ["--model.init_from=run"]),
        ("grown_adapted", ["--model.init_from=exported", "--model.vocab_size=300"]),
    ):
        done = tfdp(folder, "train", f"--run_dir={name}", *origin, "--model.lora_rank=2", *TEXT, *SHORT)
        assert done.returncode == 0, done.stderr
        done = tfdp(folder, "export", f"--run_dir={name}", "--format=peft", "--output=useless")
        assert done.returncode == 2 and "try --format huggingface --merge true" in done.stderr, done.stderr
        assert not (folder / "useless").exists()


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.multiworker
def test_a_killed_worker_shows_in_no_adapter(folder: Path) -> None:
    """Before its first checkpoint a job starts from the folder again, and after it from the checkpoint."""
    keys = [*ADAPTERS, *TEXT, *SHORT[1:], "--training.steps=300", "--checkpoint.every_steps=20"]
    keys += ["--distribution.reduction=canonical", "--training.microbatch_size=2"]
    assert tfdp(folder, "train", "--run_dir=calm", *keys).returncode == 0
    line = [sys.executable, "-m", "tfdp.launch", "--num_workers=2", "--max_restarts=3", "--", "--run_dir=killed", *keys]
    job = subprocess.Popen(
        line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "restart" in kill_a_worker(job, folder / "killed", 150)
    assert summary(folder / "killed")["state_sha256"] == summary(folder / "calm")["state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["exported", "run"])
def test_a_vocabulary_grows_only_when_asked(folder: Path, origin: str) -> None:
    import tfdp as api

    keys = [f"--model.init_from={origin}", "--model.vocab_size=300", "--optimizer.learning_rate=1e-6"]
    keys += [f"--run_dir=grown_{origin}", "--optimizer.adam_learning_rate=1e-6", *TEXT, *SHORT]
    done = tfdp(folder, "train", *keys)
    assert done.returncode == 0, done.stderr
    ids = [97, 98, 99]
    grown, before = (api.load(str(folder / name)).logits(ids) for name in (f"grown_{origin}", origin))
    np.testing.assert_allclose(grown[:, :256], before, atol=1e-2)
    rows = api.load(str(folder / f"grown_{origin}"))._model.named_weights()["token_embedding"].numpy()
    assert rows.shape[0] == 300
    np.testing.assert_allclose(rows[256:], np.tile(rows[:256].mean(axis=0), (44, 1)), atol=1e-4)


def test_tokens_of_another_tokenizer_than_the_models_are_refused(folder: Path) -> None:
    for name, tokenizer in (("same", "huggingface:exported"), ("other", "bpe:300")):
        text = ["--source=text:text/*.txt", "--validation_fraction=0.2", f"--tokenizer={tokenizer}"]
        done = tfdp(folder, "prepare", *text, f"--output=shards_{name}")
        assert done.returncode == 0, done.stderr
    keys = ["--model.init_from=exported", "--print_config"]
    assert tfdp(folder, "train", "--data.source=tokens:shards_same", *keys).returncode == 0
    refused = tfdp(folder, "train", "--data.source=tokens:shards_other", *keys)
    assert refused.returncode == 2
    rule = (
        "data.source (tokens:shards_other) must hold tokens of the tokenizer of model.init_from, but has those of bpe"
    )
    assert rule in refused.stderr and "--tokenizer huggingface:exported" in refused.stderr, refused.stderr


@pytest.mark.slow
def test_a_folder_and_a_run_are_evaluated_on_any_text(folder: Path) -> None:
    text = "--source=text:text/0.txt"
    found = [tfdp(folder, "evaluate", f"--run_dir={each}", text) for each in ("run", "exported")]
    assert all(done.returncode == 0 for done in found), found[1].stderr
    losses = [json.loads(done.stdout)["validation_loss"] for done in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    num_bytes = (folder / "text" / "0.txt").stat().st_size
    assert json.loads(found[0].stdout)["num_tokens"] == num_bytes + 1  # and an end of text


def test_generate_continues_from_an_export_as_from_its_run(folder: Path) -> None:
    arguments = ["--prompt=alpha ", "--num_tokens=24", "--temperature=0"]
    texts = [tfdp(folder, "generate", f"--run_dir={each}", *arguments) for each in ("run", "exported")]
    assert texts[0].returncode == texts[1].returncode == 0, texts[1].stderr
    assert texts[0].stdout == texts[1].stdout and len(texts[0].stdout) > 10


@pytest.mark.slow
def test_a_preset_of_keras_hub_and_a_saved_model_are_the_same_model(folder: Path) -> None:
    import tensorflow as tf

    import tfdp as api

    for form in ("keras_hub", "saved_model"):
        done = tfdp(folder, "export", "--run_dir=run", f"--output={form}", f"--format={form}")
        assert done.returncode == 0, done.stderr
    ids = [[97, 108, 112, 104, 97, 32, 98]]
    expected = api.load(str(folder / "run")).logits(ids)
    np.testing.assert_allclose(api.load(str(folder / "keras_hub")).logits(ids), expected, atol=1e-5)
    served = tf.saved_model.load(str(folder / "saved_model"))
    found = served.signatures["logits"](tokens=tf.constant(ids))["logits"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    arguments = ["--prompt=alpha ", "--num_tokens=12", "--temperature=0"]
    texts = [tfdp(folder, "generate", f"--run_dir={each}", *arguments).stdout for each in ("run", "keras_hub")]
    assert texts[0] == texts[1] and len(texts[0]) > 8
    text = ["--data.source=text:text/*.txt", "--data.validation_fraction=0.2"]
    done = tfdp(folder, "train", "--run_dir=from_hub", "--model.init_from=keras_hub", *text, *SHORT)
    assert done.returncode == 0, done.stderr
    assert summary(folder / "from_hub")["train_loss"] < 0.8 * np.log(256)


def _damage(folder: Path, name: str) -> None:
    target = folder / name
    if name == "pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif name == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif name == "no config":
        (folder / "config.json").unlink()
    else:
        target = folder / "config.json"
        config = json.loads(target.read_text())
        config |= {
            "unknown architecture": {"model_type": "mamba"},
            "unknown key": {"attn_logit_softcapping": 50.0},
            "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "shape": {"intermediate_size": 64},
            "bias": {"attention_bias": True},
            "text for a number": {"hidden_size": "wide"},
            "fraction of a layer": {"num_hidden_layers": 2.5},
            "list for a table": {"rope_parameters": [1]},
            "factor of 0": {"logit_scale": 0.0},
        }[name]
        target.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no config", "must be a folder of Hugging Face or KerasHub, with a config.json, or the directory"),
        ("pickle", "has pytorch_model.bin, a pickle, and to read one is to run what it says"),
        ("truncated", "model.safetensors must be a whole safetensors file"),
        ("unknown architecture", "must be a model of an architecture that tfdp reads"),
        ("unknown key", "whose effect tfdp does not know: attn_logit_softcapping 50.0"),
        ("yarn", "must have rotary positions of type default, linear or llama3, but has yarn"),
        ("shape", "must hold model.layers.0.mlp.gate_proj.weight of shape [64, 32]"),
        ("bias", "whose effect tfdp does not know: attention_bias true"),
        ("text for a number", "a value of its config.json is not of its type: "),
        ("fraction of a layer", "a value of its config.json is not of its type: "),
        ("list for a table", "a value of its config.json is not of its type: "),
        ("factor of 0", "whose effect tfdp does not know: logit_scale 0.0"),
    ],
)
def test_a_folder_that_is_not_understood_is_one_line(folder: Path, tmp_path: Path, damage: str, message: str) -> None:
    shutil.copytree(folder / "exported", tmp_path / "bad")
    _damage(tmp_path / "bad", damage)
    text = f"--data.source=text:{folder}/text/*.txt"
    done = tfdp(tmp_path, "train", "--run_dir=r", "--model.init_from=bad", text, *SHORT)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "train",
            ["--model.init_from=exported", "--model.num_layers=3"],
            "model.num_layers (3) must be 2, as model.init_from (exported) has it: leave it out",
        ),
        (
            "train",
            ["--model.init_from=exported", "--model.context_length=64"],
            "model.context_length (64) must be at most 32, as model.init_from (exported) has it: leave it out",
        ),
        (
            "train",
            ["--model.init_from=exported", "--model.vocab_size=250"],
            "model.vocab_size (250) must be at least 256, as model.init_from (exported) has it: leave it out",
        ),
        (
            "evaluate",
            ["--run_dir=exported"],
            "source (null) must be named to evaluate a folder of another library: try --source",
        ),
        ("generate", ["--run_dir=exported", "--checkpoint=7"], "checkpoint (7) must be best for a folder of another"),
        ("export", ["--run_dir=run"], "output (null) must name a folder: try --output exported"),
        ("export", ["--run_dir=run", "--output=exported"], "output (exported) must not exist, or be an empty folder"),
        ("export", ["--run_dir=nowhere", "--output=new"], "run_dir (nowhere) must be the directory of a run"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, command: str, arguments: list[str], message: str) -> None:
    done = tfdp(folder, command, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (folder / "new").exists()


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.multiworker
def test_a_run_that_starts_from_a_folder_is_one_run_in_any_layout(folder: Path) -> None:
    keys = ["--data.source=text:text/*.txt", "--data.validation_fraction=0.2", "--model.init_from=exported", *SHORT]
    keys += ["--distribution.reduction=canonical", "--training.microbatch_size=2"]
    runs = {
        "one": ("train", []),
        "replicas": ("train", ["--distribution.num_replicas=2"]),
        "workers": ("launch", ["--num_workers=2", "--"]),
    }
    found = {}
    for name, (command, own) in runs.items():
        done = tfdp(folder, command, *own, f"--run_dir={name}", *keys)
        assert done.returncode == 0, done.stderr
        found[name] = summary(folder / name)["state_sha256"]
    assert len(set(found.values())) == 1, found


@pytest.mark.slow
def test_adapters_alone_are_trained_sent_and_saved_and_go_out_again(folder: Path) -> None:
    done = tfdp(folder, "train", "--run_dir=adapted", *ADAPTERS, *TEXT, *SHORT, "--distribution.num_replicas=2")
    assert done.returncode == 0, done.stderr
    num_trained = summary(folder / "adapted")["num_params"]
    num_frozen = summary(folder / "run")["num_params"] + 2 * 2 * 16  # and the gains of QK-norm that an export has
    assert f"{num_trained:,} parameters trained, {num_frozen:,} frozen" in done.stdout
    rows = [json.loads(line) for line in (folder / "adapted" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["loss"] < rows[0]["loss"] < 0.8 * np.log(256)
    assert 4 * num_trained < rows[0]["reduction_bytes"] < 4.5 * num_trained  # and statistics and digests
    saved = {path.name: path.stat().st_size for path in (folder / "adapted" / "checkpoints").rglob("*.safetensors")}
    assert saved["weights.safetensors"] < 5 * num_trained + 4000

    other = tfdp(folder, "train", "--run_dir=adapted", "--model.init_from=run", "--training.steps=14")
    assert other.returncode == 2
    assert "model.init_from (run) must be exported, from which this run started: name another run_dir" in other.stderr
    refused = tfdp(folder, "export", "--run_dir=adapted", "--output=out")
    assert refused.returncode == 2
    rule = "format (huggingface) has no place for the adapters of this run: try --merge true, or --format peft"
    assert rule in refused.stderr
    for output, own in (("merged", ["--merge=true"]), ("adapter", ["--format=peft"])):
        done = tfdp(folder, "export", "--run_dir=adapted", f"--output={output}", *own)
        assert done.returncode == 0, done.stderr
    arguments = ["--prompt=alpha ", "--num_tokens=24", "--temperature=0"]
    texts = {tfdp(folder, "generate", f"--run_dir={each}", *arguments).stdout for each in ("adapted", "merged")}
    assert len(texts) == 1


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(900)
def test_a_run_with_adapters_is_one_run_in_any_layout_and_after_a_stop(folder: Path) -> None:
    """From an adapter of PEFT's form too; with dropout of the adapters' inputs."""
    keys = [*ADAPTERS, *TEXT, *SHORT, "--distribution.reduction=canonical", "--training.microbatch_size=2"]
    runs = {
        "of_one": ("train", []),
        "of_replicas": ("train", ["--distribution.num_replicas=2"]),
        "of_workers": ("launch", ["--num_workers=2", "--"]),
        "in_halves": ("train", ["--training.steps=6"]),
    }
    found = {}
    for name, (command, own) in runs.items():
        changed = [key for key in keys if not own or key.partition("=")[0] != own[0].partition("=")[0]]
        done = tfdp(folder, command, *own, f"--run_dir={name}", *changed, "--optimizer.schedule_steps=12")
        assert done.returncode == 0, done.stderr
    assert tfdp(folder, "train", "--run_dir=in_halves", "--training.steps=12").returncode == 0
    found = {name: summary(folder / name)["state_sha256"] for name in runs}
    assert len(set(found.values())) == 1, found

    assert tfdp(folder, "export", "--run_dir=of_one", "--output=peft", "--format=peft").returncode == 0
    arguments = ["--prompt=alpha ", "--num_tokens=24", "--temperature=0"]
    texts = {tfdp(folder, "generate", f"--run_dir={each}", *arguments).stdout for each in ("of_one", "peft")}
    assert len(texts) == 1
    first = []
    for origin in ("of_one", "peft"):  # the adapters come along, from a run and from PEFT's folder
        done = tfdp(
            folder, "train", f"--run_dir=on_{origin}", f"--model.init_from={origin}", *TEXT, *SHORT, *ADAPTERS[3:]
        )
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (folder / f"on_{origin}" / "metrics.jsonl").read_text().splitlines()]
        first.append(rows[0]["loss"])
        assert "lora_rank: 2" in (folder / f"on_{origin}" / "config.yaml").read_text()
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--model.lora_alpha=8"], "model.lora_alpha (8.0) needs model.lora_rank: try lora_rank 8"),
        (
            ["--model.lora_rank=8", "--model.init_from=null"],
            "model.lora_rank (8) needs model.init_from, the model that",
        ),
        (["--model.lora_rank=0"], "model.lora_rank (0) must be at least 1: try 8"),
        (
            ["--model.lora_rank=2", "--model.lora_targets=[query, quarry]"],
            "(['query', 'quarry']) must be a list of query, key,",
        ),
    ],
)
def test_a_mistake_in_adapters_is_one_line(folder: Path, keys: list[str], message: str) -> None:
    origin = [] if any("init_from" in key for key in keys) else ["--model.init_from=exported"]
    done = tfdp(folder, "train", *origin, *keys)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_a_model_that_no_architecture_equals_names_the_keys_in_the_way(folder: Path) -> None:
    text = ["--data.source=text:text/*.txt", "--data.validation_fraction=0.2", "--model.norm=layer_norm"]
    assert tfdp(folder, "train", "--run_dir=odd", *text, *SIZE, *SHORT).returncode == 0
    done = tfdp(folder, "export", "--run_dir=odd", "--output=odd_exported")
    assert done.returncode == 2
    assert (
        "no architecture for this model; the nearest is qwen3: model.norm (layer_norm) must be rms_norm" in done.stderr
    )
    assert sorted(path.name for path in folder.iterdir() if "odd" in path.name) == ["odd"]  # nothing half-written
