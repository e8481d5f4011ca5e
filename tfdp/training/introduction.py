"""What a run consists of, in a few lines for people."""

from typing import Any

from tfdp.data.pipeline import Order
from tfdp.data.sources import Corpus
from tfdp.parallel import batch_layout, distribution


def introduction(config: Any, corpus: Corpus, strategy: Any, components: Any, matrix_peak: float) -> list[str]:
    """The first lines of a run.

    Args:
      components: of the run, `assembly.Components`.
      matrix_peak: of all its devices, in floating-point operations per second.
    """

    training, step, names = config.training, components.train_step, [source.name for source in corpus.sources]
    num_replicas, how = int(strategy.num_replicas_in_sync), config.distribution
    has_islands = how.synchronization != "every_step"
    owners = (how.num_islands, components.layout, "island") if has_islands else (num_replicas, components.layout)
    cut = batch_layout.describe_batch(*owners)
    lines = [
        f"model      {components.model.describe()}",
        *(f"data       {line}" for line in corpus.describe()),
        f"order      {components.order.describe(training.steps, names)}",
        *_too_long(config, components.order, names),
        f"devices    {distribution.describe(strategy)}, matrix peak {matrix_peak / 1e9:,.0f} GFLOP/s",
        f"precision  {training.precision}, {components.compilation}",
        f"step       {cut} of {config.model.context_length} tokens",
    ]
    steps = how.synchronize_every if has_islands else 1
    if has_islands:
        count = how.num_islands // num_replicas
        lines.append(f"islands    {count} on each replica, one model again every {steps} steps")
    if step.num_reductions:
        count, megabytes = round(step.num_reductions * steps), step.reduction_bytes * steps / 1e6
        then = f", every {steps} steps" if has_islands else ""
        lines.append(f"reduction  {megabytes:,.1f} MB in {count} pack{'s' * (count > 1)}{then}")
    return lines


def _too_long(config: Any, order: Order, names: list[str]) -> list[str]:
    """How many examples do not fit into the context, and what becomes of them."""
    rule = config.data.too_long
    what = {"cut_start": "cut at the start", "cut_end": "cut at the end", "skip": "left out"}.get(rule)
    found = []
    for each, name in zip(order.sequences, names, strict=True):
        count, at_start = getattr(each, "num_too_long", 0), getattr(each, "num_cut_at_start", 0)
        if rule == "cut_input":
            what = "cut before what is learned" + (f", {at_start:,} of them at the start" if at_start else "")
        if count:
            found.append(f"too long   {count:,} documents of {name}: {what} (data.too_long {rule})")
    return found
