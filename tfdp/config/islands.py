"""Rules between keys of a run whose islands take steps of their own (`distribution.synchronization local`)."""

import math
from typing import Any

from tfdp.system.exits import require


def require_islands_fit(config: Any) -> None:
    """Raises `ConfigError` where other keys ask for what only steps that synchronise every time have."""
    how, training = config.distribution, config.training
    if how.synchronization == "every_step":
        return
    wanted = "with distribution.synchronization local"
    fitting = math.gcd(training.global_batch_size, how.num_islands)
    require(
        fitting == how.num_islands,
        "distribution.num_islands",
        how.num_islands,
        f"must divide training.global_batch_size ({training.global_batch_size}): try {fitting}",
    )
    rules: dict[str, tuple[Any, bool, str]] = {
        "training.precision": (training.precision, training.precision != "float16", "must be float32 or bfloat16"),
        "training.ema_decay": (training.ema_decay, training.ema_decay is None, "must be null"),
        "training.on_spike": (training.on_spike, training.on_spike != "rollback", "must be stop or skip"),
    }
    for key, (value, holds, rule) in rules.items():
        require(holds, key, value, f"{rule} {wanted}")
