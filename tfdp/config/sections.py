"""The sections of a configuration: every key, its default, its help and its rules."""

import json
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from tfdp.config import options, source_syntax
from tfdp.system.exits import require, require_at_most
from tfdp.system.messages import nearest

MOST = 2**31 - 1  # of any count: steps, tokens, bytes of a pack. TensorFlow counts with 32 bits in places
MOST_TOKENS = 2**24  # of a global batch: a float32 counts valid tokens exactly up to there
MOST_DEVICES = 1024
A_DAY = 86_400  # seconds


# ---------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)  # else jsonargparse asks for a subclass of each section instead of its keys
class _Section:
    """The checks of a section: each names its key once."""

    _PREFIX: ClassVar[str] = ""  # of the section's dotted keys

    def _require(self, condition: bool, name: str, rule: str) -> None:
        """Raises `ConfigError` "key (value) rule" unless `condition` holds."""
        require(condition, f"{self._PREFIX}{name}", getattr(self, name), rule)

    def _require_at_most(self, **limits: float) -> None:
        require_at_most(self, self._PREFIX, **limits)


LoraTarget = Literal["query", "key", "value", "output", "gate", "up", "down"]


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The shape of the GPT."""

    _PREFIX = "model."

    init_from: str | None = None
    """Folder with a model to start from: of Hugging Face (config.json and safetensors), an adapter of PEFT, a KerasHub
    preset, or a run directory. The model's shape and the tokenizer come from there; null: random weights."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Number of query heads; divides model_dim unless head_dim is set."""
    num_kv_heads: int | None = None
    """Number of key and value heads, which divides num_heads (grouped-query attention); null: num_heads."""
    head_dim: int | None = None
    """Width of each head; null: model_dim / num_heads."""
    model_dim: int = 128
    """Width of the residual stream."""
    mlp_dim: int | None = None
    """Hidden width of the MLP; null: 4 * model_dim, or 8/3 * model_dim rounded up to a multiple of 64 with swiglu."""
    context_length: int = 128
    """Length of a training sequence in tokens, and the most tokens that a prediction can look back on."""
    position: Literal["learned", "sinusoidal", "rope"] = "rope"
    """How positions enter: a learned table, a fixed sinusoidal table, or rotary embedding of queries and keys."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary embedding is extended beyond the context length of pretraining. none: not at all; linear: every
    position is divided by rope_scaling_factor; llama3: only long wavelengths are multiplied by it (as in Llama 3.1)."""
    rope_scaling_factor: float = 8.0
    """With linear and llama3: the factor by which the context is extended."""
    rope_low_frequency_factor: float = 1.0
    """With llama3: wavelengths above rope_original_context_length / this are multiplied by the full factor."""
    rope_high_frequency_factor: float = 4.0
    """With llama3: wavelengths below rope_original_context_length / this stay as they are."""
    rope_original_context_length: int = 8192
    """With llama3: the context length of pretraining, in tokens."""
    layers_without_rope: tuple[int, ...] = ()
    """With position rope: layers, counted from 0, that have no rotary embedding (NoPE)."""
    sliding_window: int | None = None
    """Number of most recent tokens that each token attends to, itself included; null: no limit."""
    prompt_attention: Literal["causal", "whole"] = "causal"
    """With the recipe seq2seq, what each token of an input sees. causal: the tokens before it, as in other models;
    whole: all of the input."""
    norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
    """Normalisation before attention, before the MLP and before the output projection."""
    activation: Literal["gelu", "swiglu"] = "swiglu"
    """Non-linearity of the MLP: tanh-approximated GELU, or SwiGLU (a gated pair of projections)."""
    dropout: float = 0.0
    """Fraction of activations dropped after the embedding and each residual branch, in [0, 1)."""
    use_bias: bool = False
    """Whether projections and layer norms have biases, as GPT-2's do."""
    qkv_bias: bool | None = None
    """Whether the projection to queries, keys and values has a bias; null: the value of use_bias."""
    qk_norm: bool = True
    """Whether queries and keys are RMS-normalised before their product, which allows higher learning rates."""
    qk_norm_gain: bool = False
    """Whether qk_norm has learned gains, one per dimension of a head, as in Qwen3."""
    vocab_size: int | None = None
    """Rows of the embedding tables; null: one per token of the tokenizer. Rows beyond its tokens are never sampled."""
    tie_embeddings: bool = False
    """Whether the output projection and the token embedding are one table."""
    norm_epsilon: float = 1e-5
    """Added to the variance (or mean square) inside the normalisation."""
    init_stddev: float = 0.02
    """Standard deviation of the initial weights; for projections into the residual stream, divided by
    sqrt(2 * num_layers)."""
    zero_init: bool = True
    """Whether projections into the residual stream, and the output projection if not tied, start at zero instead."""
    lora_rank: int | None = None
    """Rank of low-rank adapters (LoRA), which alone are trained then; all other weights are frozen. null: none, all
    weights are trained."""
    lora_alpha: float | None = None
    """Adapters are multiplied by lora_alpha / lora_rank; null: 2 * lora_rank."""
    lora_rank_stabilised: bool = False
    """Whether adapters are multiplied by lora_alpha / sqrt(lora_rank) instead (rsLoRA), as high ranks need."""
    lora_targets: tuple[LoraTarget, ...] | None = None
    """Matrix products of a block that have adapters: query, key, value, output (of attention), gate, up, down (of the
    MLP; gate with swiglu only); null: all of them."""
    lora_dropout: float = 0.0
    """Fraction of the inputs of adapters dropped in training, in [0, 1)."""

    def __post_init__(self) -> None:
        self._require_at_most(num_layers=10_000, model_dim=2**20, mlp_dim=2**24, context_length=MOST_TOKENS)
        # Bounded before its nearest divisor is searched for: with head_dim, num_heads need not divide model_dim.
        self._require_at_most(num_heads=2**20, norm_epsilon=1000, init_stddev=1000)
        for name in ("num_layers", "num_heads", "model_dim", "context_length"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        self._require(
            self.head_dim is not None or self.model_dim % self.num_heads == 0,
            "num_heads",
            f"must divide model.model_dim ({self.model_dim}): try {_nearest_divisor(self.model_dim, self.num_heads)}",
        )
        self._require(
            self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            f"must divide model.num_heads ({self.num_heads}): try {_nearest_divisor(self.num_heads, self.kv_heads)}",
        )
        self._check_attention()  # first: a width per head below 1 is no reason to try other positions
        self._check_position()
        self._check_adapters()
        self._require(self.hidden_dim >= 1, "mlp_dim", "must be at least 1")
        self._require(0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1): try 0.1")
        self._require(self.norm_epsilon > 0, "norm_epsilon", "must be positive: try 1e-5")
        self._require(self.init_stddev > 0, "init_stddev", "must be positive: try 0.02")

    def _check_position(self) -> None:
        self._require(
            self.position != "rope" or self.dim_per_head % 2 == 0,
            "position",
            f"needs an even width per head ({self.dim_per_head}): try learned",
        )
        self._require(
            self.position != "sinusoidal" or self.model_dim % 2 == 0,
            "position",
            f"needs an even model.model_dim ({self.model_dim}): try {self.model_dim + 1}",
        )

    def _check_attention(self) -> None:
        self._require_at_most(head_dim=2**20, sliding_window=MOST_TOKENS, vocab_size=2**24)
        self._require_at_most(rope_theta=1e12, rope_scaling_factor=1e6, rope_original_context_length=MOST)
        for name in ("head_dim", "sliding_window", "vocab_size"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "must be at least 1")
        self._require(self.rope_theta > 1, "rope_theta", "must be above 1: try 10000")
        self._require(self.rope_scaling_factor >= 1, "rope_scaling_factor", "must be at least 1: try 8")
        low, high = self.rope_low_frequency_factor, self.rope_high_frequency_factor
        rule = f"must lie between 0 and model.rope_high_frequency_factor ({high:g}): try 1"
        self._require(0 < low < high, "rope_low_frequency_factor", rule)
        self._require(
            self.rope_original_context_length >= 1, "rope_original_context_length", "must be at least 1: try 8192"
        )
        for layer in self.layers_without_rope:
            rule = f"must list layers from 0 to {self.num_layers - 1}"
            require(0 <= layer < self.num_layers, "model.layers_without_rope", layer, rule)
        self._require(self.qk_norm or not self.qk_norm_gain, "qk_norm_gain", "needs model.qk_norm true")
        narrow = self.sliding_window is not None and self.sliding_window < self.context_length
        rule = f"must be causal with model.sliding_window {self.sliding_window}, which hides a part of the input"
        self._require(self.prompt_attention == "causal" or not narrow, "prompt_attention", rule)

    def _check_adapters(self) -> None:
        self._require_at_most(lora_rank=2**16, lora_alpha=1e6)
        self._require(self.lora_rank is None or self.lora_rank >= 1, "lora_rank", "must be at least 1: try 8")
        for name in ("lora_alpha", "lora_rank_stabilised", "lora_targets", "lora_dropout"):
            given = getattr(self, name) not in (None, False, 0.0)
            self._require(self.lora_rank is not None or not given, name, "needs model.lora_rank: try lora_rank 8")
        self._require(self.adapter_alpha > 0, "lora_alpha", "must be positive: try 16")
        self._require(0.0 <= self.lora_dropout < 1.0, "lora_dropout", "must lie in [0, 1): try 0.05")
        targets = self.lora_targets
        self._require(
            targets is None or len({*targets}) == len(targets) > 0, "lora_targets", "must name at least one, each once"
        )
        is_gated = self.activation == "swiglu"
        self._require(
            is_gated or "gate" not in (targets or ()),
            "lora_targets",
            "has gate with model.activation swiglu only: leave gate out",
        )

    @property
    def adapted_targets(self) -> tuple[str, ...]:
        """The matrix products that have adapters; none without lora_rank."""
        if self.lora_rank is None:
            return ()
        every = (each for each in get_args(LoraTarget) if each != "gate" or self.activation == "swiglu")
        return tuple(every) if self.lora_targets is None else self.lora_targets

    @property
    def adapter_alpha(self) -> float:
        return 2.0 * (self.lora_rank or 1) if self.lora_alpha is None else self.lora_alpha

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def attention_dim(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.dim_per_head

    @property
    def has_qkv_bias(self) -> bool:
        return self.use_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_dim(self) -> int:
        if self.mlp_dim is not None:
            return self.mlp_dim
        if self.activation == "swiglu":
            return -(-8 * self.model_dim // (3 * 64)) * 64
        return 4 * self.model_dim


@dataclass(frozen=True)
class KerasModelConfig(_Section):
    """A Keras model, and the function that builds it."""

    _PREFIX = "model."

    builder: str = ""
    """MODULE:FUNCTION, a function that returns a keras.Model from token ids (batch, time) to logits (batch, time,
    vocabulary); it may take vocab_size and context_length."""
    arguments: str = "{}"
    """Other arguments of the builder, by name: an object in JSON."""
    context_length: int = 128
    """Length of a training sequence in tokens."""

    def __post_init__(self) -> None:
        self._require_at_most(context_length=MOST_TOKENS)
        self._require(self.context_length >= 2, "context_length", "must be at least 2")
        is_named = re.fullmatch(r"[^\s:]+:[^\s:]+", self.builder) is not None
        self._require(
            is_named or not self.builder, "builder", "must be MODULE:FUNCTION: try my_package.my_module:build"
        )
        try:
            is_object = isinstance(json.loads(self.arguments), dict)
        except ValueError:
            is_object = False
        self._require(is_object, "arguments", 'must be an object in JSON: try {"num_layers": 4}')


_TOKENIZERS = ("bpe", "gpt2", "sentencepiece", "huggingface")  # kinds that name something after a colon


@dataclass(frozen=True)
class DataConfig(_Section):
    """The text, and how it is tokenised."""

    _PREFIX = "data."

    source: str = "python-stdlib"
    """Training text: python-stdlib (the source code of Python's standard library), text:GLOB (UTF-8 files),
    jsonl:GLOB[:FIELD], parquet:GLOB[:COLUMN], csv:GLOB[:COLUMN], tfds:NAME[/CONFIG][:SPLIT][:FIELD], tokens:FOLDER (of
    tfdp.prepare), or a weighted sum of several: 0.7 * tokens:A + 0.3 * tokens:B."""
    validation_source: str | None = None
    """Validation text, written as source is; null: held out from source by validation_fraction, or by tfdp.prepare."""
    validation_fraction: float = 0.02
    """Fraction of the text held out for validation: whole documents, or its end where it is one document."""
    tokenizer: str = "auto"
    """bytes (one token per UTF-8 byte), bpe:SIZE (trained on the text), bpe:FOLDER, gpt2:FOLDER,
    sentencepiece:FILE, huggingface:FOLDER (with a tokenizer.json); auto: that of tokens:FOLDER or model.init_from, else
    bytes."""
    template: str = "auto"
    """How fields of a record become one text. Of a pair: a text with {input} and {target} or {label}, or the names of
    other fields; auto: input, a line break, target. Of messages: chatml, tokenizer (the chat template of its folder),
    or a text with {content} for each role, in JSON; auto: that of the tokenizer if it has one, else chatml."""
    input_field: str | None = None
    """Field of a record (of jsonl, parquet or csv) that a model is given: it is seen, and not learned."""
    target_field: str | None = None
    """Field of a record that is learned: an answer, a translation, a summary."""
    label_field: str | None = None
    """Field of a record that is its class."""
    messages_field: str | None = None
    """Field of a record that is a conversation: [{"role": "user", "content": "..."}, ...]; what the assistant says is
    learned."""
    sequences: Literal["packed", "documents", "whole"] = "packed"
    """packed: documents end to end, cut into sequences; documents: each one starts a sequence, padded at its end;
    whole: as many whole documents in a sequence as fit."""
    too_long: Literal["cut_start", "cut_end", "cut_input", "skip", "refuse"] = "cut_start"
    """What happens to an example, or with sequences whole to a document, that is longer than the context. cut_start:
    its last tokens stay; cut_end: its first ones; cut_input: of an example all that is learned, the 8 tokens before it
    and the first ones of its prompt; skip: it is left out; refuse: the run ends. The first lines of a run say how many
    there are."""
    document_attention: bool = False
    """Whether attention and positions restart at each document of a packed sequence, so that documents do not see each
    other."""
    partition: Literal["shuffled", "block", "row"] = "shuffled"
    """Order of the sequences. shuffled: a new seeded shuffle in each epoch; block: each row of the batch, and so each
    replica, reads a contiguous block of the text; row: the text in order, dealt to the rows in turn."""
    cache_dir: str | None = None
    """Where token shards are kept between runs; null: $XDG_CACHE_HOME/tfdp or ~/.cache/tfdp."""
    excluded_positions: tuple[int, ...] = ()
    """Positions in the order of training (step * global_batch_size + row, both from 0) whose sequences are
    skipped."""

    def __post_init__(self) -> None:
        num_sources = len(source_syntax.parse(self.source))
        self._require(
            self.partition != "block" or num_sources == 1,
            "partition",
            f"must be shuffled or row with {num_sources} sources, which take turns in each row",
        )
        kind, _, address = self.tokenizer.partition(":")
        self._require(self.cache_dir != "", "cache_dir", "must name a folder: try null")
        kinds = (*_TOKENIZERS, "auto", "bytes")
        self._require(
            self.tokenizer in ("auto", "bytes") or bool(kind in _TOKENIZERS and address),
            "tokenizer",
            "must be auto, bytes, bpe:SIZE, bpe:FOLDER, gpt2:FOLDER, sentencepiece:FILE or huggingface:FOLDER"
            + options.did_you_mean(nearest(kind, kinds) if kind not in kinds else None),
        )
        for position in self.excluded_positions:
            rule = "must hold positions from 0 to 2**63 - 1: try [448]"
            require(0 <= position < 2**63, "data.excluded_positions", position, rule)
        self._require(
            self.validation_source is not None or 0.0 < self.validation_fraction < 1.0,
            "validation_fraction",
            "must lie between 0 and 1 unless data.validation_source is given: try 0.05",
        )


@dataclass(frozen=True)
class OptimizerConfig(_Section):
    """The update rule and its learning rate."""

    _PREFIX = "optimizer."

    name: Literal["adamw", "adam", "sgd", "momentum", "rmsprop", "lion", "adafactor", "muon"] = "muon"
    """Update rule; muon is Muon for the matrices of the blocks and AdamW for everything else."""
    learning_rate: float = 0.009
    """Peak learning rate; adamw wants about a third of muon's."""
    adam_learning_rate: float | None = 0.02
    """Peak learning rate of muon's AdamW part; null: learning_rate. Other rules ignore it."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    """After warm-up: constant, linear or cosine decay to final_fraction, or wsd (constant, then linear decay)."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly from 0."""
    final_fraction: float = 0.0
    """Learning rate of the last step as a fraction of the peak (linear, cosine, wsd)."""
    schedule_steps: int | None = None
    """Steps that the schedule spans; null: training.steps. Set it if you may extend the run later."""
    decay_fraction: float = 0.7
    """Fraction of the steps, at the end, over which wsd decays."""
    weight_decay: float | None = None
    """Decoupled weight decay, multiplied by the learning rate at each step; null: 0.1 for adamw and lion, 0.01 for
    muon, else 0."""
    decay_embeddings: bool = False
    """Whether weight decay applies to embedding tables; it never applies to gains and biases."""
    beta_1: float = 0.9
    """Decay rate of the first moment of adamw, adam, lion and muon's Adam part."""
    beta_2: float = 0.95
    """Decay rate of the second moment of adamw, adam, rmsprop, muon's Adam part, and of lion's momentum."""
    epsilon: float = 1e-8
    """Added to the root of the second moment ("epsilon hat" of Kingma and Ba); rmsprop adds it under the root."""
    momentum: float = 0.9
    """Momentum of the rules momentum and muon."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, applied after the reduction over replicas; null: no clipping."""

    def __post_init__(self) -> None:
        self._require_at_most(learning_rate=1000, adam_learning_rate=1000, weight_decay=1000, epsilon=1000)
        self._require_at_most(warmup_steps=MOST, schedule_steps=MOST)
        self._require(self.learning_rate > 0, "learning_rate", "must be positive: try 1e-3")
        adam_rate = self.adam_learning_rate
        self._require(adam_rate is None or adam_rate > 0, "adam_learning_rate", "must be positive")
        self._require(self.warmup_steps >= 0, "warmup_steps", "must not be negative: try 0")
        for name in ("beta_1", "beta_2", "momentum"):
            value = getattr(self, name)
            self._require(0.0 <= value < 1.0, name, "must lie in [0, 1): try 0.9")
        self._require(self.name != "lion" or self.beta_1 > 0, "beta_1", "must be positive for lion: try 0.9")
        for name in ("final_fraction", "decay_fraction"):
            value = getattr(self, name)
            self._require(0.0 <= value <= 1.0, name, "must lie in [0, 1]: try 0.1")
        self._require(self.decay_rate >= 0, "weight_decay", "must not be negative: try 0")
        self._require(self.schedule_steps is None or self.schedule_steps >= 1, "schedule_steps", "must be at least 1")
        self._require(self.epsilon > 0, "epsilon", "must be positive: try 1e-8")
        self._require(
            self.clip_norm is None or self.clip_norm > 0,
            "clip_norm",
            "must be positive, or null for no clipping: try 1.0",
        )

    @property
    def decay_rate(self) -> float:
        if self.weight_decay is not None:
            return self.weight_decay
        return {"adamw": 0.1, "lion": 0.1, "muon": 0.01}.get(self.name, 0.0)


@dataclass(frozen=True)
class TrainingConfig(_Section):
    """Length, batch sizes and precision of training, and what is reported and checked on the way."""

    _PREFIX = "training."

    steps: int = 350
    """Optimizer steps of the whole run."""
    patience: int | None = None
    """Evaluations in a row without a better validation loss, or metric of the task, that end the run; null: no number
    does."""
    max_seconds: float | None = None
    """Seconds of the run, over all its starts, after which it ends with an evaluation and a checkpoint; null: no
    limit."""
    global_batch_size: int = 16
    """Sequences per optimizer step, over all replicas and micro-batches."""
    microbatch_size: int | None = None
    """Sequences per forward pass on one replica; null: global_batch_size / num_replicas, divided by
    parallel_microbatches."""
    parallel_microbatches: int | None = None
    """Micro-batches that a replica computes in parallel, each on its own cores; a power of two; null: on CPUs one per
    core where that is faster, else 1."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward and backward pass; weights, optimizer state and sums are always float32. float16 scales
    the loss, and repeats a step at half the scale if its gradient overflows."""
    jit_compile: bool | Literal["auto"] = "auto"
    """Whether XLA compiles the step; auto: yes, but on CPUs, in bfloat16 or with large matrices, only what lies between
    the matrix products, which oneDNN computes faster."""
    loss_chunk_size: int | None = None
    """Tokens that are projected to the vocabulary at once; null: all if their logits take at most 128 MiB, else as many
    as take 64 MiB; 0: all."""
    remat: bool = False
    """Whether the backward pass recomputes the activations of each block, which saves memory and takes more time."""
    log_every: int = 20
    """Steps between two lines on the console and in metrics.jsonl."""
    evaluate_every: int = 150
    """Steps between two evaluations on the whole validation split (there is one at the end too); 0: only at the end."""
    evaluation_rows: int | None = None
    """Sequences per forward pass of an evaluation on each replica; null: microbatch_size, or if that is
    null too, global_batch_size, but at most 16."""
    sample_tokens: int = 256
    """Tokens of the text that is sampled after each evaluation; 0: none."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights over the steps, in [0, 1); after t steps at most
    (1 + t) / (10 + t). It is evaluated, sampled, read back and exported in place of the weights; null: none."""
    profile_steps: str | None = None
    """A:B profiles the steps A + 1 to B, for TensorBoard's profile page; null: none."""
    verify_every: int = 100
    """Steps between two bit-by-bit comparisons of the weights and optimizer state of all replicas; each save compares
    too; 0: never."""
    on_spike: Literal["stop", "skip", "rollback"] = "stop"
    """What to do about a step whose loss jumps or is not finite. stop: end the run; skip: continue without its update;
    rollback: go back to the last checkpoint and exclude the sequences that caused it."""
    spike_threshold: float | None = 10.0
    """A loss jumps if it is this many robust standard deviations above recent ones; null: only a loss or gradient that
    is not finite is a spike."""
    max_spikes: int = 20
    """With skip and rollback: the number of spikes that ends the run."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "patience",
            "max_seconds",
            "log_every",
            "evaluate_every",
            "sample_tokens",
            "verify_every",
            "max_spikes",
            "loss_chunk_size",
        )
        rows = ("global_batch_size", "microbatch_size", "evaluation_rows")
        self._require_at_most(**dict.fromkeys(counts, MOST), **dict.fromkeys(rows, MOST_TOKENS))
        self._require_at_most(parallel_microbatches=MOST_DEVICES)
        self._require(self.spike_threshold is None or self.spike_threshold > 0, "spike_threshold", "must be positive")
        for name in ("steps", "global_batch_size", "log_every"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        self._require(
            self.evaluation_rows is None or self.evaluation_rows >= 1, "evaluation_rows", "must be at least 1"
        )
        self._require(
            self.loss_chunk_size is None or self.loss_chunk_size >= 0,
            "loss_chunk_size",
            "must not be negative: try 0 for all tokens at once",
        )
        if self.profile_steps is not None:
            is_pair = re.fullmatch(r"[0-9]{1,10}:[0-9]{1,10}", self.profile_steps) is not None
            is_range = is_pair and self.profiled[0] < self.profiled[1]
            self._require(is_range, "profile_steps", "must be A:B with A < B: try 20:25")
        for name in ("evaluate_every", "sample_tokens", "verify_every", "max_spikes"):
            self._require(getattr(self, name) >= 0, name, "must not be negative: try 0")
        self._check_ends()
        decay = self.ema_decay
        self._require(decay is None or 0.0 <= decay < 1.0, "ema_decay", "must lie in [0, 1): try 0.999")
        self._check_microbatches()

    def _check_ends(self) -> None:
        self._require(self.patience is None or self.patience >= 1, "patience", "must be at least 1: try 3")
        rule = "needs evaluations on the way: set training.evaluate_every"
        self._require(self.patience is None or self.evaluate_every > 0, "patience", rule)
        self._require(self.max_seconds is None or self.max_seconds > 0, "max_seconds", "must be positive: try 3600")

    def _check_microbatches(self) -> None:
        parallel = self.parallel_microbatches
        self._require(
            parallel is None or (parallel >= 1 and parallel & (parallel - 1) == 0),
            "parallel_microbatches",
            "must be a power of two: try 2",
        )
        if self.microbatch_size is not None:
            size = self.microbatch_size
            self._require(size >= 1, "microbatch_size", "must be at least 1")
            self._require(
                self.global_batch_size % size == 0,
                "global_batch_size",
                f"must be a multiple of training.microbatch_size ({size}): "
                f"try {-(-self.global_batch_size // size) * size}",
            )

    @property
    def profiled(self) -> tuple[int, ...]:
        """The steps between which a profile is taken; () for none."""
        return tuple(map(int, self.profile_steps.split(":"))) if self.profile_steps is not None else ()

    @property
    def rows_of_evaluation(self) -> int:
        return self.evaluation_rows or self.microbatch_size or min(self.global_batch_size, 16)


_OF_ISLANDS = (
    "num_islands",
    "synchronize_every",
    "outer_optimizer",
    "outer_learning_rate",
    "outer_momentum",
    "delta_dtype",
)


@dataclass(frozen=True)
class DistributionConfig(_Section):
    """Replicas and workers, and how gradients are summed over them."""

    _PREFIX = "distribution."

    strategy: Literal["auto", "one_device", "mirrored", "multi_worker_mirrored", "parameter_server"] = "auto"
    """auto: multi_worker_mirrored if TF_CONFIG or SLURM names several workers, else mirrored. parameter_server: a chief
    hands out the rounds of islands to workers that may come and go (docs/synchronization.md)."""
    num_replicas: int | None = None
    """Replicas per worker; null: one per GPU, or 1. Without a GPU they are logical CPU devices."""
    reduction: Literal["fast", "canonical"] = "fast"
    """Order of the sums over micro-batches and replicas. fast: TensorFlow's; canonical: one fixed tree, which gives the
    same bits in any layout."""
    synchronization: Literal["every_step", "local"] = "every_step"
    """every_step: gradients are summed over all replicas in every step. local: islands take synchronize_every steps on
    their own, then an outer optimizer joins what they have changed (docs/synchronization.md)."""
    num_islands: int = 4
    """With local: models that learn apart from one another. A number of the run, not of the machines: each replica
    carries the same number of them, a power of two."""
    synchronize_every: int = 30
    """With local: steps of a round, after which the islands become one model again."""
    outer_optimizer: Literal["nesterov", "average"] = "nesterov"
    """With local: nesterov: SGD with momentum on the mean change of the islands (DiLoCo); average: their mean."""
    outer_learning_rate: float = 0.7
    """Of the outer optimizer nesterov."""
    outer_momentum: float = 0.9
    """Of the outer optimizer nesterov."""
    delta_dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """With local: type in which the change of an island travels; what it loses is kept and added the next time."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are sent between replicas; bfloat16 halves the bytes and rounds each replica's sum."""
    transport: Literal["auto", "tcp", "tensorflow"] = "auto"
    """How workers exchange gradients. tcp: plain TCP connections, for CPUs with one replica per worker; tensorflow: its
    collectives over NCCL or gRPC; auto: tcp where possible, unless bytes_per_pack is set."""
    bytes_per_pack: int | None = None
    """Bytes of gradients that are reduced together; 0: each tensor separately; null: all together over TCP, 32 MiB
    between GPUs, 0 between two replicas of one process, else 16 MiB."""
    peer_timeout_seconds: float = 60.0
    """Seconds that another worker may be silent before it counts as lost (exit code 76)."""
    start_timeout_seconds: float = 600.0
    """Seconds that a worker waits at startup for the others to join and agree (exit code 76 if they do not)."""

    def __post_init__(self) -> None:
        self._require_at_most(num_replicas=MOST_DEVICES, bytes_per_pack=MOST, peer_timeout_seconds=A_DAY)
        self._require_at_most(num_islands=MOST_DEVICES, synchronize_every=MOST)
        self._require(
            self.strategy != "parameter_server" or self.synchronization != "every_step",
            "strategy",
            "needs distribution.synchronization local",
        )
        self._require(
            self.strategy != "parameter_server" or self.num_replicas in (None, 1),
            "num_replicas",
            "must be 1 with distribution.strategy parameter_server: its workers compute",
        )
        self._require(self.num_islands >= 1, "num_islands", "must be at least 1: try 4")
        self._require(self.synchronize_every >= 1, "synchronize_every", "must be at least 1: try 30")
        self._require(self.outer_learning_rate > 0, "outer_learning_rate", "must be positive: try 0.7")
        self._require(0 <= self.outer_momentum < 1, "outer_momentum", "must lie in [0, 1): try 0.9")
        for name in _OF_ISLANDS:  # which would change nothing, without a word
            given, default = getattr(self, name), getattr(DistributionConfig, name)
            rule = f"is for distribution.synchronization local: add it, or leave this key at {default}"
            self._require(self.synchronization != "every_step" or given == default, name, rule)
        self._require(
            self.synchronization == "every_step" or self.wire_dtype == "float32",
            "wire_dtype",
            "must be float32 with distribution.synchronization local",
        )
        self._require(self.num_replicas is None or self.num_replicas >= 1, "num_replicas", "must be at least 1")
        self._require(
            self.strategy != "one_device" or self.num_replicas in (None, 1),
            "num_replicas",
            "must be 1 with distribution.strategy one_device: try mirrored",
        )
        self._require(
            self.wire_dtype == "float32" or self.reduction == "fast",
            "wire_dtype",
            "must be float32 with distribution.reduction canonical: rounded sums of replicas differ by layout",
        )
        self._require(
            self.bytes_per_pack is None or self.bytes_per_pack >= 0,
            "bytes_per_pack",
            "must not be negative: try 16777216",
        )
        self._require(self.peer_timeout_seconds >= 1, "peer_timeout_seconds", "must be at least 1: try 60")
        self._require(
            1 <= self.start_timeout_seconds <= 3600,
            "start_timeout_seconds",
            "must lie in [1, 3600]: try 600; after an hour TensorFlow gives up",
        )
        self._require(
            self.transport != "tcp" or self.num_replicas in (None, 1),
            "num_replicas",
            "must be 1 with distribution.transport tcp: try distribution.transport auto",
        )
        self._require(
            self.transport != "tcp" or self.bytes_per_pack is None,
            "bytes_per_pack",
            "must be null with distribution.transport tcp, which sends all in one piece",
        )


@dataclass(frozen=True)
class CheckpointConfig(_Section):
    """When checkpoints are saved, and how many are kept."""

    _PREFIX = "checkpoint."

    every_steps: int = 250
    """Steps between two checkpoints (there is one at the end too); 0: only at the end."""
    keep: int = 3
    """Number of newest checkpoints to keep; the best one, by validation loss or the task's metric, is kept as well."""

    def __post_init__(self) -> None:
        self._require_at_most(every_steps=MOST, keep=MOST)
        self._require(self.every_steps >= 0, "every_steps", "must not be negative: try 0")
        self._require(self.keep >= 1, "keep", "must be at least 1")


@dataclass(frozen=True)
class SamplingConfig(_Section):
    """How text is sampled from a model."""

    num_tokens: int = 256
    """Most tokens to generate; an end-of-text token ends the text sooner."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draw from this many most likely tokens; null: from all."""
    top_p: float | None = None
    """Draw from the most likely tokens that together have this probability; null: from all."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation, such as ["\\n\\n"]; the first that appears is not part of it."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        self._require_at_most(num_tokens=MOST, top_k=MOST, seed=2**63 - 1, temperature=1000)
        self._require(self.num_tokens >= 1, "num_tokens", "must be at least 1")
        self._require(self.seed >= 0, "seed", "must not be negative: try 0")
        self._require(self.temperature >= 0, "temperature", "must not be negative: try 0.8")
        self._require(self.top_k is None or self.top_k >= 1, "top_k", "must be at least 1: try 40")
        self._require(self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p", "must lie in (0, 1]: try 0.95")
        self._require(all(self.stop), "stop", "must hold texts of at least one character")


@dataclass(frozen=True)
class DecodingConfig(_Section):
    """How a model writes the outputs that are scored."""

    _PREFIX = "decoding."

    method: Literal["greedy", "beam", "sampling"] = "greedy"
    """greedy: always the likeliest token; beam: a search for the likeliest output; sampling: drawn."""
    max_tokens: int = 64
    """Most tokens of an output. An input may take three quarters of the context, or all but this where that is more."""
    beam_size: int = 4
    """With beam: beginnings that are kept."""
    length_penalty: float = 0.6
    """With beam: the log-likelihood of an output of n tokens is divided by ((5 + n) / 6) to this power; 0: by 1."""
    temperature: float = 1.0
    """With sampling: divides the logits."""
    top_k: int | None = None
    """With sampling: draw from this many likeliest tokens; null: from all."""
    top_p: float | None = None
    """With sampling: draw from the likeliest tokens that together have this probability; null: from all."""
    seed: int = 0
    """With sampling: seed of the draws."""
    num_examples: int | None = 500
    """Examples of each validation set for which an evaluation writes outputs, spread evenly over it; null: all."""
    rows: int = 64
    """Rows that a replica computes at the same time: outputs, or beginnings of beams. Fewer take less memory."""

    def __post_init__(self) -> None:
        self._require_at_most(num_examples=MOST, temperature=1000, length_penalty=100, seed=2**63 - 1, top_k=MOST)
        self._require_at_most(max_tokens=MOST_TOKENS, rows=2**16, beam_size=2**10)
        for name in ("max_tokens", "beam_size", "rows", "num_examples", "top_k"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "must be at least 1")
        self._require(self.length_penalty >= 0, "length_penalty", "must not be negative: try 0.6")
        self._require(self.temperature > 0, "temperature", "must be positive: try 1, or decoding.method greedy")
        self._require(self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p", "must lie in (0, 1]: try 0.95")
        self._require(self.seed >= 0, "seed", "must not be negative: try 0")
        for name, default in (("temperature", 1.0), ("top_k", None), ("top_p", None)):
            is_used = self.method == "sampling" or getattr(self, name) == default
            self._require(is_used, name, f"needs decoding.method sampling, and it is {self.method}")

    def describe(self) -> str:
        """The search in a few words, as results are reported with."""
        if self.method == "beam":
            return f"beam {self.beam_size}, length penalty {self.length_penalty:g}, {self.max_tokens} tokens at most"
        drawn = f", temperature {self.temperature:g}, top k {self.top_k}, top p {self.top_p}, seed {self.seed}"
        return f"{self.method}{drawn if self.method == 'sampling' else ''}, {self.max_tokens} tokens at most"


Score = Literal["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "squad_exact_match", "squad_f1", "wer"]


@dataclass(frozen=True)
class DecodingChoice:
    """The search of a command that reads a run of the recipe seq2seq; null: that of training."""

    method: Literal["greedy", "beam", "sampling"] | None = None
    """Of a run of the recipe seq2seq: how outputs are written; null: as in training (decoding.method)."""
    beam_size: int | None = None
    """With beam: beginnings that are kept; null: as in training."""
    length_penalty: float | None = None
    """With beam: see decoding.length_penalty; null: as in training."""
    max_tokens: int | None = None
    """Most tokens of an output; null: as in training."""
    temperature: float | None = None
    """With sampling: divides the logits; null: as in training."""
    top_k: int | None = None
    """With sampling: draw from this many likeliest tokens; null: as in training."""
    top_p: float | None = None
    """With sampling: draw from the likeliest tokens that together have this probability; null: as in training."""

    def chosen(self, config: Any) -> Any:
        """The configuration of a run with the keys that are named. Raises `ConfigError` for those without effect."""
        named = {
            field.name: value for field in fields(DecodingChoice) if (value := getattr(self, field.name)) is not None
        }
        writes = hasattr(config, "decoding") and bool(getattr(config, "metrics", True))
        first = next(iter(named), "method")
        require(writes or not named, first, named.get(first), "is for a run of the recipe seq2seq that has metrics")
        if not named:
            return config
        found = replace(config.decoding, **named)
        for name in ("beam_size", "length_penalty"):
            is_used = found.method == "beam" or name not in named
            require(is_used, name, named.get(name), f"needs --method beam, and it is {found.method}")
        return replace(config, decoding=found)


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number below 2**32 that is nearest to the one that was wanted."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return min(sorted({*small, *(number // divisor for divisor in small)}), key=lambda divisor: abs(divisor - wanted))
