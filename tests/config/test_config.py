"""The configuration: precedence, and every mistake in one line."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from tfdp.config import parsing as config_module
from tfdp.config import sections
from tfdp.config.parsing import known_keys, load_file, to_yaml
from tfdp.config.run_config import changed_keys, with_run_config
from tfdp.config.sections import (
    CheckpointConfig,
    DataConfig,
    DistributionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainingConfig,
)
from tfdp.recipe import find_trainer, import_recipe
from tfdp.system.exits import CommandError, ConfigError
from trainers.causal_lm import Config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def load(*argv: str) -> Config:
    return config_module.load(Config, argv, "python -m tfdp.train", "Trains.")


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def value_of(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config


# --- Reading ---------------------------------------------------------------------------------------


def test_no_argument_gives_the_defaults() -> None:
    config = load()
    assert config == Config()
    assert (config.seed, config.run_dir, config.trainer) == (0, None, "causal_lm")
    assert (config.model.kv_heads, config.model.dim_per_head, config.model.hidden_dim) == (4, 32, 384)
    assert (config.data.source, config.data.tokenizer, config.optimizer.decay_rate) == ("python-stdlib", "auto", 0.01)


@pytest.mark.parametrize(
    ("model", "hidden_dim"),
    [
        (ModelConfig(model_dim=384, num_heads=6, activation="gelu"), 1536),
        (ModelConfig(model_dim=128), 384),  # 8/3 * 128 = 341.3, rounded up to 6 * 64
        (ModelConfig(model_dim=768, activation="swiglu"), 2048),
        (ModelConfig(mlp_dim=100), 100),
    ],
)
def test_the_hidden_width_follows_the_activation(model: ModelConfig, hidden_dim: int) -> None:
    assert model.hidden_dim == hidden_dim


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.1), ("lion", 0.1), ("muon", 0.01), ("adam", 0.0), ("sgd", 0.0)])
def test_the_default_weight_decay_follows_the_optimizer(name: str, rate: float) -> None:
    assert load("--optimizer.name", name).optimizer.decay_rate == rate
    assert load("--optimizer.name", name, "--optimizer.weight_decay", "0.5").optimizer.decay_rate == 0.5


@pytest.mark.parametrize("order", ["yaml first", "yaml last", "yaml between", "equals sign"])
def test_flags_win_over_yaml_wherever_they_stand(tmp_path: Path, order: str) -> None:
    path = write_yaml(tmp_path, "seed: 1\nmodel:\n  num_layers: 2\n  norm: layer_norm\n")
    seed, layers, yaml = ["--seed", "7"], ["--model.num_layers=3"], ["--config", path]
    argv = {
        "yaml first": yaml + seed + layers,
        "yaml last": seed + layers + yaml,
        "yaml between": seed + yaml + layers,
        "equals sign": seed + layers + [f"--config={path}"],
    }[order]
    config = load(*argv)
    assert (config.seed, config.model.num_layers, config.model.norm) == (7, 3, "layer_norm")
    assert config == dataclasses.replace(Config(), seed=7, model=ModelConfig(num_layers=3, norm="layer_norm"))


def test_the_last_of_two_yamls_wins(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nmodel: {num_layers: 2}")
    (tmp_path / "b.yaml").write_text("seed: 2")
    config = load("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert (config.seed, config.model.num_layers) == (2, 2)


def test_rules_hold_for_yaml_and_flags_together(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "model: {model_dim: 96, num_heads: 6}")
    assert load("--config", path, "--model.num_heads", "3").model.dim_per_head == 32
    with pytest.raises(ConfigError, match=re.escape("model.num_heads (5) must divide model.model_dim (96): try 4")):
        load("--config", path, "--model.num_heads", "5")


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "model: {}\n"])
def test_a_yaml_without_keys_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load("--config", write_yaml(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--optimizer.learning_rate", "6e-4"], "optimizer.learning_rate", 6e-4),
        (["--optimizer.clip_norm", "null"], "optimizer.clip_norm", None),
        (["--training.jit_compile", "true"], "training.jit_compile", True),
        (["--training.jit_compile", "false"], "training.jit_compile", False),
        (["--training.jit_compile", "auto"], "training.jit_compile", "auto"),
        (["--model.tie_embeddings", "false"], "model.tie_embeddings", False),
        (["--model.mlp_dim", "48"], "model.mlp_dim", 48),
        (["--run_dir", "123"], "run_dir", "123"),
        (["--training.profile_steps", "20:25"], "training.profile_steps", "20:25"),
        (["--run_dir", "3e-4"], "run_dir", "3e-4"),
        (["--data.source", "text:a b/[0-9]*.txt"], "data.source", "text:a b/[0-9]*.txt"),
        (["--seed", "2", "--seed=2"], "seed", 2),
    ],
)
def test_flags_are_read_as_their_types(argv: list[str], key: str, value: object) -> None:
    found = value_of(load(*argv), key)
    assert found == value and type(found) is type(value)


def test_yaml_reads_floats_without_a_point(tmp_path: Path) -> None:
    assert load("--config", write_yaml(tmp_path, "optimizer: {learning_rate: 6e-4}")).optimizer.learning_rate == 6e-4


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(run_dir="runs/é 1", seed=3, data=DataConfig(source="text:a: b/*.txt", validation_source="text:[1]")),
        Config(run_dir="123", optimizer=OptimizerConfig(learning_rate=1e-7, clip_norm=None, epsilon=1e-12)),
        Config(run_dir="true", training=TrainingConfig(jit_compile=False, microbatch_size=8)),
        Config(run_dir="3e-4"),
        Config(run_dir="1e-3/a", model=ModelConfig(num_kv_heads=2, position="learned", use_bias=True)),
    ],
)
def test_the_written_yaml_reads_back_equal(tmp_path: Path, config: Config) -> None:
    assert load_file(Config, Path(write_yaml(tmp_path, to_yaml(config)))) == config


def test_print_config_prints_what_config_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--model.num_layers", "2", "--seed", "5", "--print_config")
    assert caught.value.code == 0
    path = Path(write_yaml(tmp_path, capsys.readouterr().out))
    assert load_file(Config, path) == dataclasses.replace(Config(), seed=5, model=ModelConfig(num_layers=2))


def test_help_shows_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    options = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    entries = {entry.partition(" ")[0]: entry for entry in re.split(r" --(?=[a-z_])", options)}
    for key in known_keys(Config):
        default = value_of(Config(), key)
        shown = "null" if default is None else str(default)
        assert f"default: {shown})" in entries[key], entries[key]
        assert len(entries[key].partition("(type:")[0].split()) > 4, f"{key} says nothing about itself"


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_parses(path: Path) -> None:
    config = load_file(import_recipe(find_trainer(["--config", str(path)])).Config, path)
    assert config != Config(), "a recipe changes something"


# --- Mistakes: key, value, rule, fix ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.num_layer", "3"], "unknown key model.num_layer on the command line: did you mean model.num_layers?"),
        (["--optimzer.name=adam"], "unknown key optimzer.name on the command line: did you mean optimizer.name?"),
        (
            ["--learning_rate", "1"],
            "unknown key learning_rate on the command line: did you mean optimizer.learning_rate?",
        ),
        (["--qqq", "1"], "unknown key qqq on the command line: --help lists the keys"),
        (["--model.num_layers", "two"], "model.num_layers (two) must be a whole number"),
        (["--model.num_layers", "1.5"], "model.num_layers (1.5) must be a whole number"),
        (["--model.num_layers", ""], "model.num_layers () must be a whole number"),
        (["--training.steps", "1e3"], "training.steps (1000.0) must be a whole number"),
        (["--seed"], "seed must be followed by a value: a whole number"),
        (["--model.use_bias", "1"], "model.use_bias (1) must be true or false"),
        (["--optimizer.learning_rate", "fast"], "optimizer.learning_rate (fast) must be a number"),
        (["--optimizer.learning_rate", "nan"], "optimizer.learning_rate (nan) must be a number"),
        (["--optimizer.clip_norm", "inf"], "optimizer.clip_norm (inf) must be a number or null"),
        (["--training.jit_compile", "maybe"], "training.jit_compile (maybe) must be true or false or one of auto"),
        (
            ["--model.position", "ropee"],
            "model.position (ropee) must be one of learned, sinusoidal, rope: did you mean rope?",
        ),
        (["--model.norm", "zz"], "model.norm (zz) must be one of layer_norm, rms_norm"),
        (
            ["--optimizer.name", "Adam"],
            "optimizer.name (Adam) must be one of adamw, adam, sgd, momentum, rmsprop, lion, adafactor, muon: "
            "did you mean adam?",
        ),
        (["--config"], "--config must be followed by a YAML file, as in --config FILE.yaml"),
        (["--config", "/none/such.yaml"], "--config (/none/such.yaml) must be an existing YAML file"),
        (["--config=/"], "--config (/) must be an existing YAML file"),
        (["adamw"], "unrecognized arguments: adamw"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layer: 3}", "unknown key model.num_layer in {path}: did you mean model.num_layers?"),
        ("run_dri: a", "unknown key run_dri in {path}: did you mean run_dir?"),
        ("num_heads: 2", "unknown key num_heads in {path}: did you mean model.num_heads?"),
        ("1: 2", "unknown key 1 in {path}: --help lists the keys"),
        ("model: 3", "model (3) in {path} must be a section with keys below it"),
        ("- seed", "--config ({path}) must hold keys and values, such as `seed: 1`"),
        ("model: {num_layers: x}", "model.num_layers (x) must be a whole number"),
        ("model: {num_layers: [1, 2]}", "model.num_layers ([1, 2]) must be a whole number"),
        ("seed: 1.5", "seed (1.5) must be a whole number"),
        ("data: {source: 12}", "data.source (12) must be text"),
        (
            "optimizer: {name: 3}",
            "optimizer.name (3) must be one of adamw, adam, sgd, momentum, rmsprop, lion, adafactor, muon",
        ),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate (nan) must be a finite number"),
        ("optimizer: {weight_decay: .nan}", "optimizer.weight_decay (nan) must be a finite number"),
        ("model: {dropout: .nan}", "model.dropout (nan) must be a finite number"),
    ],
)
def test_a_wrong_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write_yaml(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load("--config", path)
    assert str(caught.value) == message.format(path=path)


def test_a_misspelt_section_suggests_the_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^unknown key optimiser in .*: did you mean optimizer\?$"):
        load("--config", write_yaml(tmp_path, "optimiser: {name: adam}"))


@pytest.mark.parametrize("key", ["model.num_layers", "optimizer.learning_rate", "data.source", "training.jit_compile"])
def test_null_is_refused_where_a_key_does_not_allow_it(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} \((null|None)\) must be "):
        load("--config", write_yaml(tmp_path, f"{section}: {{{name}: null}}"))


@pytest.mark.parametrize("key", ["optimizer.learning_rate", "optimizer.epsilon", "model.init_stddev"])
def test_infinity_is_refused_in_yaml_as_it_is_in_flags(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    for argv in ([f"--{key}", "inf"], ["--config", write_yaml(tmp_path, f"{section}: {{{name}: .inf}}")]):
        with pytest.raises(ConfigError, match=rf"^{re.escape(key)} \(inf\) must be "):
            load(*argv)


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"^seed \({seed}\) must "):
        load("--seed", str(seed))


@pytest.mark.parametrize("content", [b"model: [1\n", b"\tseed: 1\n", b"run_dir: \xe9\n"])
def test_a_broken_yaml_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load("--config", str(path))
    assert str(caught.value).startswith(f"--config ({path}) must be valid YAML: ")
    assert "\n" not in str(caught.value)


RULES: list[tuple[type, dict[str, object], str]] = [
    (
        TrainingConfig,
        {"loss_chunk_size": -1},
        "training.loss_chunk_size (-1) must not be negative: try 0 for all tokens at once",
    ),
    (TrainingConfig, {"profile_steps": "9"}, "training.profile_steps (9) must be A:B with A < B: try 20:25"),
    (TrainingConfig, {"profile_steps": "9:9"}, "training.profile_steps (9:9) must be A:B with A < B: try 20:25"),
    (
        DistributionConfig,
        {"transport": "tcp", "num_replicas": 2},
        "distribution.num_replicas (2) must be 1 with distribution.transport tcp: try distribution.transport auto",
    ),
    (
        DistributionConfig,
        {"transport": "tcp", "bytes_per_pack": 0},
        "distribution.bytes_per_pack (0) must be null with distribution.transport tcp, which sends all in one piece",
    ),
    (
        DistributionConfig,
        {"bytes_per_pack": -1},
        "distribution.bytes_per_pack (-1) must not be negative: try 16777216",
    ),
    (
        DistributionConfig,
        {"wire_dtype": "bfloat16", "reduction": "canonical"},
        "distribution.wire_dtype (bfloat16) must be float32 with distribution.reduction canonical: rounded sums of "
        "replicas differ by layout",
    ),
    (ModelConfig, {"num_heads": 3}, "model.num_heads (3) must divide model.model_dim (128): try 2"),
    (ModelConfig, {"num_heads": 0}, "model.num_heads (0) must be at least 1"),
    (ModelConfig, {"num_layers": 0}, "model.num_layers (0) must be at least 1"),
    (ModelConfig, {"model_dim": -1}, "model.model_dim (-1) must be at least 1"),
    (ModelConfig, {"context_length": 0}, "model.context_length (0) must be at least 1"),
    (ModelConfig, {"num_kv_heads": 3}, "model.num_kv_heads (3) must divide model.num_heads (4): try 2"),
    (ModelConfig, {"num_kv_heads": 0}, "model.num_kv_heads (0) must divide model.num_heads (4): try 1"),
    (ModelConfig, {"num_kv_heads": -2}, "model.num_kv_heads (-2) must divide model.num_heads (4): try 1"),
    (ModelConfig, {"num_kv_heads": 8}, "model.num_kv_heads (8) must divide model.num_heads (4): try 4"),
    (
        ModelConfig,
        {"model_dim": 12, "position": "rope"},
        "model.position (rope) needs an even width per head (3): try learned",
    ),
    (
        ModelConfig,
        {"model_dim": 5, "num_heads": 5, "position": "sinusoidal"},
        "model.position (sinusoidal) needs an even model.model_dim (5): try 6",
    ),
    (ModelConfig, {"mlp_dim": 0}, "model.mlp_dim (0) must be at least 1"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout (1.0) must lie in [0, 1): try 0.1"),
    (ModelConfig, {"dropout": -0.1}, "model.dropout (-0.1) must lie in [0, 1): try 0.1"),
    (ModelConfig, {"norm_epsilon": 0.0}, "model.norm_epsilon (0.0) must be positive: try 1e-5"),
    (ModelConfig, {"init_stddev": 0.0}, "model.init_stddev (0.0) must be positive: try 0.02"),
    (
        DataConfig,
        {"validation_fraction": 0.0},
        "data.validation_fraction (0.0) must lie between 0 and 1 unless data.validation_source is given: try 0.05",
    ),
    (OptimizerConfig, {"learning_rate": float("nan")}, "optimizer.learning_rate (nan) must be positive: try 1e-3"),
    (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning_rate (0.0) must be positive: try 1e-3"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps (-1) must not be negative: try 0"),
    (OptimizerConfig, {"beta_1": 1.0}, "optimizer.beta_1 (1.0) must lie in [0, 1): try 0.9"),
    (OptimizerConfig, {"beta_2": -0.1}, "optimizer.beta_2 (-0.1) must lie in [0, 1): try 0.9"),
    (OptimizerConfig, {"momentum": 2.0}, "optimizer.momentum (2.0) must lie in [0, 1): try 0.9"),
    (OptimizerConfig, {"final_fraction": 1.5}, "optimizer.final_fraction (1.5) must lie in [0, 1]: try 0.1"),
    (OptimizerConfig, {"decay_fraction": -0.5}, "optimizer.decay_fraction (-0.5) must lie in [0, 1]: try 0.1"),
    (OptimizerConfig, {"schedule_steps": 0}, "optimizer.schedule_steps (0) must be at least 1"),
    (OptimizerConfig, {"weight_decay": -1.0}, "optimizer.weight_decay (-1.0) must not be negative: try 0"),
    (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon (0.0) must be positive: try 1e-8"),
    (
        OptimizerConfig,
        {"clip_norm": 0.0},
        "optimizer.clip_norm (0.0) must be positive, or null for no clipping: try 1.0",
    ),
    (TrainingConfig, {"steps": 0}, "training.steps (0) must be at least 1"),
    (TrainingConfig, {"log_every": 0}, "training.log_every (0) must be at least 1"),
    (TrainingConfig, {"evaluate_every": -1}, "training.evaluate_every (-1) must not be negative: try 0"),
    (TrainingConfig, {"sample_tokens": -1}, "training.sample_tokens (-1) must not be negative: try 0"),
    (TrainingConfig, {"patience": 0}, "training.patience (0) must be at least 1: try 3"),
    (
        TrainingConfig,
        {"patience": 2, "evaluate_every": 0},
        "training.patience (2) needs evaluations on the way: set training.evaluate_every",
    ),
    (TrainingConfig, {"max_seconds": 0.0}, "training.max_seconds (0.0) must be positive: try 3600"),
    (TrainingConfig, {"ema_decay": 1.0}, "training.ema_decay (1.0) must lie in [0, 1): try 0.999"),
    (TrainingConfig, {"ema_decay": -0.1}, "training.ema_decay (-0.1) must lie in [0, 1): try 0.999"),
    (TrainingConfig, {"microbatch_size": 0}, "training.microbatch_size (0) must be at least 1"),
    (
        TrainingConfig,
        {"global_batch_size": 30, "microbatch_size": 8},
        "training.global_batch_size (30) must be a multiple of training.microbatch_size (8): try 32",
    ),
    (DistributionConfig, {"num_replicas": 0}, "distribution.num_replicas (0) must be at least 1"),
    (
        DistributionConfig,
        {"num_replicas": 2, "strategy": "one_device"},
        "distribution.num_replicas (2) must be 1 with distribution.strategy one_device: try mirrored",
    ),
    (CheckpointConfig, {"every_steps": -1}, "checkpoint.every_steps (-1) must not be negative: try 0"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep (0) must be at least 1"),
    (SamplingConfig, {"num_tokens": 0}, "num_tokens (0) must be at least 1"),
    (SamplingConfig, {"temperature": -1.0}, "temperature (-1.0) must not be negative: try 0.8"),
    (SamplingConfig, {"top_k": 0}, "top_k (0) must be at least 1: try 40"),
    (SamplingConfig, {"seed": -1}, "seed (-1) must not be negative: try 0"),
    (SamplingConfig, {"top_p": 0.0}, "top_p (0.0) must lie in (0, 1]: try 0.95"),
]


@pytest.mark.parametrize(("section", "values", "message"), RULES, ids=[rule[2].partition(" must")[0] for rule in RULES])
def test_a_broken_rule_names_key_value_rule_and_fix(section: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value) == message


def test_values_at_the_edge_of_a_rule_are_right() -> None:
    ModelConfig(dropout=0.0, num_kv_heads=1, model_dim=12, position="learned")
    ModelConfig(model_dim=5, num_heads=5, position="learned")
    DataConfig(validation_fraction=0.0, validation_source="text:v.txt")
    OptimizerConfig(warmup_steps=0, beta_1=0.0, final_fraction=1.0, clip_norm=None, weight_decay=0.0)
    TrainingConfig(global_batch_size=8, microbatch_size=8, evaluate_every=0, sample_tokens=0, ema_decay=0.0)
    SamplingConfig(temperature=0.0, top_k=1, top_p=1.0)


LIMITS: list[tuple[type, str, float, float]] = [
    (ModelConfig, "num_layers", 10_000, 10**9),
    (ModelConfig, "mlp_dim", 2**24, 2**40),
    (ModelConfig, "vocab_size", 2**24, 2**40),
    (OptimizerConfig, "learning_rate", 1000, 1e30),
    (OptimizerConfig, "adam_learning_rate", 1000, 1e30),
    (OptimizerConfig, "weight_decay", 1000, 1e30),
    (OptimizerConfig, "warmup_steps", 2**31 - 1, 2**31),
    (TrainingConfig, "steps", 2**31 - 1, 10**40),
    (TrainingConfig, "log_every", 2**31 - 1, 2**63),
    (TrainingConfig, "sample_tokens", 2**31 - 1, 10**400),
    (TrainingConfig, "max_seconds", 2**31 - 1, 1e12),
    (TrainingConfig, "global_batch_size", 2**24, 2**24 + 1),
    (TrainingConfig, "parallel_microbatches", 1024, 2048),
    (DistributionConfig, "num_replicas", 1024, 1_000_000),
    (DistributionConfig, "bytes_per_pack", 2**31 - 1, 2**40),
    (DistributionConfig, "peer_timeout_seconds", 86_400, 1e12),
    (CheckpointConfig, "keep", 2**31 - 1, 2**63),
    (SamplingConfig, "num_tokens", 2**31 - 1, 2**63),
    (SamplingConfig, "seed", 2**63 - 1, 2**63),
]


@pytest.mark.parametrize(("section", "name", "most", "more"), LIMITS, ids=[f"{each[1]}" for each in LIMITS])
def test_each_key_has_an_upper_limit(section: type, name: str, most: float, more: float) -> None:
    assert getattr(section(**{name: most}), name) == most
    with pytest.raises(ConfigError, match=rf"{name} \(.{{1,80}}\) must be at most {most:,}$"):
        section(**{name: more})


def test_every_number_of_a_run_has_an_upper_limit() -> None:
    for key, kind in known_keys(Config).items():
        if {int, float} & {kind, *typing.get_args(kind)}:
            with pytest.raises(ConfigError, match=rf"^{re.escape(key)} \("):
                load(f"--{key}", str(10**38))


@pytest.mark.timeout(60)
def test_the_nearest_divisor_is_found_at_once() -> None:
    assert sections._nearest_divisor(2**20, 5) == 4
    assert sections._nearest_divisor(3 * 2**38, 100) == 96
    assert sections._nearest_divisor(96, 5) == 4
    assert sections._nearest_divisor(7, 0) == 1


@pytest.mark.timeout(60)
def test_too_many_heads_of_a_given_width_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^model.num_heads \(100000000000000000\) must be at most 1,048,576$"):
        load("--model.head_dim", "64", "--model.num_heads", str(10**17))


def test_a_head_without_width_is_the_mistake_that_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"^model.head_dim \(-1\) must be at least 1$"):
        ModelConfig(head_dim=-1)


# --- Recipes ---------------------------------------------------------------------------------------


def test_the_trainer_is_found_in_flags_before_yaml(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "trainer: from_yaml")
    assert find_trainer([]) == "causal_lm"
    assert find_trainer(["--config", path]) == "from_yaml"
    assert find_trainer(["--config", path, "--trainer", "from_flag"]) == "from_flag"
    assert find_trainer(["--trainer=from_flag", f"--config={path}"]) == "from_flag"


def test_the_trainer_that_runs_is_the_one_the_config_names() -> None:
    argv = ["--trainer", "second"]
    assert find_trainer(argv) == load(*argv).trainer == "second"


@pytest.mark.parametrize("name", ["causal_lm", "trainers.causal_lm"])
def test_a_recipe_is_found_by_short_and_by_dotted_name(name: str) -> None:
    assert import_recipe(name).Config is Config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("causal", "trainer (causal) must name a module: trainers.causal does not exist; try causal_lm"),
        ("os.none", "trainer (os.none) must name a module: os.none does not exist; try causal_lm"),
        ("json.decoder", "trainer (json.decoder) must be a module that defines Config"),
        ("causal_lm.py", "trainer (causal_lm.py) must name a module: causal_lm.py does not exist; try causal_lm"),
        (".causal_lm", "trainer (.causal_lm) must name a module: .causal_lm does not exist; try causal_lm"),
    ],
)
def test_a_wrong_recipe_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_recipe(name)
    assert str(caught.value) == message


def test_a_recipe_of_the_users_own_may_live_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "recipe.py").write_text("from trainers.causal_lm import Config, train\n")
    (tmp_path / "my" / "half.py").write_text("from trainers.causal_lm import Config\n")
    (tmp_path / "my" / "broken.py").write_text("import none_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_recipe("my.recipe").Config is Config
    with pytest.raises(ConfigError) as refused:
        import_recipe("my.half")
    assert str(refused.value) == (
        "trainer (my.half) must be a recipe, but it does not define make_model, make_task, make_sequences, "
        "weight_shapes; or a program with a train(config) of its own"
    )
    with pytest.raises(
        CommandError, match=r"No module named 'none_such_library' \(\S+/my/broken.py, line 1\)$"
    ) as caught:
        import_recipe("my.broken")  # the recipe is there: what it lacks must not be hidden
    assert caught.value.exit_code == 1


# ---------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------


def test_a_run_directory_brings_its_own_configuration_below_flags_and_config(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    old = Config(run_dir="elsewhere", seed=5, model=ModelConfig(num_layers=2, num_heads=2))
    (run_dir / "config.yaml").write_text(to_yaml(old))
    path = write_yaml(tmp_path, "model:\n  num_heads: 8\n")
    argv = with_run_config(["--run_dir", str(run_dir), "--config", str(path), "--training.steps", "9"])
    found = load(*argv)
    assert (found.run_dir, found.seed, found.training.steps) == (str(run_dir), 5, 9)
    assert (found.model.num_layers, found.model.num_heads) == (2, 8)


def test_a_new_run_directory_brings_nothing(tmp_path: Path) -> None:
    argv = ["--run_dir", str(tmp_path / "new")]
    assert with_run_config(argv) == argv
    assert with_run_config([]) == []


def test_changed_keys_are_told() -> None:
    old, new = to_yaml(Config(seed=1)), to_yaml(Config(seed=2, model=ModelConfig(num_layers=5)))
    assert changed_keys(old, new) == ["seed: 1 -> 2", "model.num_layers: 4 -> 5"]
