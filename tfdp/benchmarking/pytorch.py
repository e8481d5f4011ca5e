"""A GPT-2 of transformers in PyTorch with a fused AdamW and clipping: eager or compiled; several workers under DDP."""

import json
import os
from typing import Any

import numpy as np

from tfdp.benchmarking.pace import Pace
from tfdp.benchmarking.shapes import Shape, shuffled_batches


def run(shape: Shape, variant: str, num_replicas: int, pace: Pace) -> None:
    """Trains steps as they are asked for; never returns."""
    import torch
    import torch.distributed
    from torch.nn.functional import cross_entropy
    from transformers import GPT2Config, GPT2LMHeadModel

    dtype, *options = variant.split("+")
    index, num_workers = _join(torch) if "TF_CONFIG" in os.environ else (0, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        pace.device_memory = torch.cuda.max_memory_allocated
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.model_dim,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one fused operation
        use_cache=False,
    )
    model: Any = GPT2LMHeadModel(config)
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parameters = list(model.parameters())
    if num_workers > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        if "wire" in options:
            model.register_comm_hook(None, _compression(torch))

    def loss_of(tokens: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(tokens[:, :-1]).logits
            return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    if "compile" in options:
        loss_of = torch.compile(loss_of)
    rows = shape.num_rows // num_workers
    for batch in shuffled_batches(shape, rows, seed=index):
        tokens = torch.from_numpy(batch.astype(np.int64)).to(device)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        float(loss)  # as a training loop reads it; on a GPU it waits for the step
        pace.done(1)


def _compression(torch: Any) -> Any:
    """A hook of DDP that sends gradients in bfloat16. gloo takes it, but DDP refuses it under its own name."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    def compress(_state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return bf16_compress_hook(torch.distributed.group.WORLD, bucket)

    return compress


def _join(torch: Any) -> tuple[int, int]:
    """Joins the workers that TF_CONFIG names; returns this one's index and their number."""
    cluster = json.loads(os.environ["TF_CONFIG"])
    addresses, index = cluster["cluster"]["worker"], cluster["task"]["index"]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{addresses[0]}", rank=index, world_size=len(addresses)
    )
    return index, len(addresses)
