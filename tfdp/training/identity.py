"""What makes two processes the same run: a process resumes only a checkpoint with the same."""

from dataclasses import asdict
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfdp.data.sources import Corpus


def identity(config: Any, corpus: "Corpus") -> dict[str, Any]:
    """What a process must have in common with a checkpoint to resume it: the shapes, the data and its order.

    A recipe names keys of its own that belong to it as `identity_keys` of its Config.
    """
    free = {
        "dropout",
        "lora_dropout",
        "init_stddev",
        "init_from",
    }  # may change on the way: they shape neither tensors nor data
    model = {f"model.{key}": value for key, value in asdict(config.model).items() if key not in free}
    return {
        **model,
        "data.tokenizer": corpus.tokenizer.fingerprint,
        "data.sequences": config.data.sequences,
        "data.document_attention": config.data.document_attention,
        "data.too_long": config.data.too_long,
        "data.partition": config.data.partition,
        "corpus_sha256": corpus.corpus_sha256,
        "split_sha256": corpus.split_sha256,
        "optimizer.name": config.optimizer.name,
        "training.global_batch_size": config.training.global_batch_size,
        "seed": config.seed,
        **_of_islands(config.distribution),
        **{key: attrgetter(key)(config) for key in getattr(config, "identity_keys", ())},
    }


def _of_islands(distribution: Any) -> dict[str, Any]:
    """How the run synchronises, and what shapes the state of islands that take steps of their own."""
    keys = ("synchronization", "num_islands", "outer_optimizer", "delta_dtype")
    is_every_step = distribution.synchronization == "every_step"
    return {f"distribution.{key}": getattr(distribution, key) for key in (keys[:1] if is_every_step else keys)}
