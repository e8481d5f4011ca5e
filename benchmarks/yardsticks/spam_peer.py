"""GPT-2 of transformers with random weights, as a classifier of mails: `spam.py transformers` calls it.

Like for like with tfdp: the same mails, tokenizer, layers, width, heads, context, and as many steps of as many mails.
A mail is cut at its end. AdamW (0.9, 0.95, weight decay 0.1), a linear decay to zero after 10 steps, and the gradient
clipped to 1. The weights with the best macro F1 on valid.jsonl are kept. Prints the seconds of training alone.

`--pretrain_steps` learns the next token of the training mails first, packed into rows of the context, as tfdp's recipe
causal_lm does.
"""

import copy
import math
import random
import time
from argparse import Namespace
from typing import Any

import spam
from splits import Record, refuse

try:
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
except ImportError as missing:
    refuse(f"the comparison needs PyTorch, transformers and tokenizers: {missing}")

EVALUATIONS = 6


def load_tokenizer(options: Namespace) -> Any:
    files = [str(options.tokenizer / name) for name in ("vocabulary.json", "merges.txt")]
    try:
        return ByteLevelBPETokenizer.from_file(*files)
    except Exception as error:  # the library raises bare exceptions
        refuse(f"--tokenizer {options.tokenizer}: {error}: name the folder tokenizer of a run with bpe:SIZE")


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


@torch.no_grad()
def labels_of(model: Any, rows: list[list[int]], pad: int) -> list[str]:
    model.eval()
    order, found = sorted(range(len(rows)), key=lambda at: len(rows[at])), [""] * len(rows)
    for begin in range(0, len(order), 64):
        chosen = order[begin : begin + 64]
        ids, mask = padded([rows[at] for at in chosen], pad)
        best = model(input_ids=ids, attention_mask=mask).logits.argmax(-1).tolist()
        for at, label in zip(chosen, best, strict=True):
            found[at] = spam.LABELS[label]
    model.train()
    return found


class Optimizer:
    """AdamW with its schedule; adds up the seconds of its steps."""

    def __init__(self, model: Any, rate: float, steps: int) -> None:
        self.model, self.rate, self.steps, self.step, self.seconds = model, rate, steps, 0, 0.0
        self.rule = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)

    def __call__(self, loss_of: Any) -> float:
        started = time.perf_counter()
        self.step += 1
        factor = min(self.step / 10, max(0.0, 1 - (self.step - 10) / max(1, self.steps - 10)), 1.0)
        for group in self.rule.param_groups:
            group["lr"] = self.rate * factor
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.rule.step()
        self.rule.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - started
        return float(loss.detach())


def pretrain(config: Any, rows: list[list[int]], options: Namespace) -> Any:
    """A language model of the training mails, `options.pretrain_rows` rows of the context in each step."""
    model = GPT2LMHeadModel(config)
    stream = torch.tensor([id for row in rows for id in [*row, config.eos_token_id]])
    stream = stream[: len(stream) // options.context * options.context].reshape(-1, options.context)
    optimizer, order = Optimizer(model, options.learning_rate, options.pretrain_steps), torch.randperm(len(stream))
    for step in range(options.pretrain_steps):
        first = step * options.pretrain_rows
        chosen = stream[order[[(first + at) % len(stream) for at in range(options.pretrain_rows)]]]
        loss = optimizer(lambda chosen=chosen: model(input_ids=chosen, labels=chosen).loss)
        if (step + 1) % 20 == 0:
            line = f"pretraining step {step + 1}/{options.pretrain_steps} | loss {loss:.4f}"
            print(f"{line} | {optimizer.seconds:.0f} s", flush=True)
    return model


def predict(train: list[Record], valid: list[Record], tests: list[Record], options: Namespace) -> list[str]:
    """The labels of the test mails."""
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(options)
    pad = tokenizer.get_vocab_size()
    whole = [each.ids for each in tokenizer.encode_batch([each["text"] for each in train])]
    rows = {"train": [ids[: options.context] or [pad] for ids in whole]}
    for name, records in (("valid", valid), ("test", tests)):
        encoded = tokenizer.encode_batch([each["text"] for each in records])
        rows[name] = [each.ids[: options.context] or [pad] for each in encoded]
    targets = torch.tensor([spam.LABELS.index(each["label"]) for each in train])
    config = GPT2Config(
        vocab_size=pad + 1,
        n_positions=options.context,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        pad_token_id=pad,
        eos_token_id=pad,
        bos_token_id=pad,
        num_labels=len(spam.LABELS),
    )
    model = GPT2ForSequenceClassification(config)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    if options.pretrain_steps:
        model.transformer.load_state_dict(pretrain(config, whole, options).transformer.state_dict())
    wanted, generator = [each["label"] for each in valid], random.Random(options.seed)
    optimizer, best, best_score = Optimizer(model, options.learning_rate, options.steps), None, -math.inf
    order: list[int] = []
    for step in range(1, options.steps + 1):
        if len(order) < options.batch:
            order = generator.sample(range(len(train)), len(train))
        chosen, order = order[: options.batch], order[options.batch :]
        ids, mask = padded([rows["train"][at] for at in chosen], pad)
        given = {"input_ids": ids, "attention_mask": mask, "labels": targets[chosen]}
        loss = optimizer(lambda given=given: model(**given).loss)
        if step % max(1, options.steps // EVALUATIONS) == 0 or step == options.steps:
            found = spam.macro_f1(spam.confusion(wanted, labels_of(model, rows["valid"], pad)))
            line = f"step {step:5}/{options.steps} | loss {loss:.4f} | macro F1 on valid {100 * found:.2f} %"
            print(f"{line} | {optimizer.seconds:.0f} s", flush=True)
            if found > best_score:
                best, best_score = copy.deepcopy(model.state_dict()), found
    model.load_state_dict(best)
    print(f"trained {optimizer.seconds:.1f} s; best macro F1 on valid {100 * best_score:.2f} %")
    return labels_of(model, rows["test"], pad)
