"""An encoder-decoder beside tfdp's translation: `python benchmarks/yardsticks/translation_peer.py --data DIR ...`.

A Marian model of transformers with random weights (the Transformer of Vaswani et al. 2017 as translation uses it: layer
norm after each block, sinusoidal positions, one table for both languages and the output), trained in PyTorch on the
train.jsonl of translation.py. Like for like means the same pairs, the same tokenizer (`--tokenizer`), as many weights
(`--num_params`, which chooses the width), as many steps of as many pairs, the same threads. A layer of width d has
12 d^2 weights in a prefix language model and in an encoder, 16 d^2 in a decoder, so 6 layers stand beside 3 + 3 that
are a little narrower. Zhang et al. (2022) compare the two so: the prefix language model is behind at small sizes.

AdamW (0.9, 0.98), cosine to zero after a warm-up, label smoothing 0.1 and dropout 0.1: the habits of translation. The
weights with the best loss on valid.jsonl are kept. Prints the seconds of training, without evaluation and decoding;
writes predictions greedy.jsonl and beam4.jsonl for `translation.py score`, and prints BLEU and chrF of both.
"""

import copy
import math
import random
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import translation
from splits import Parser, read, refuse, write_outputs

try:
    import torch
    from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
    from transformers import MarianConfig, MarianMTModel
except ImportError as missing:
    refuse(f"the comparison needs PyTorch, transformers and tokenizers: {missing}")

PAD, END = "<pad>", "</s>"
Pair = tuple[list[int], list[int]]


def load_tokenizer(named: Path | None, size: int, texts: list[str]) -> Tokenizer:
    """A file of tokenizers, a `bpe:FOLDER` of tfdp, or a byte-level BPE of the texts; with padding and an end."""
    if named is None:
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(texts, vocab_size=size, special_tokens=[PAD, END], show_progress=False)
        return trained._tokenizer
    try:
        if named.is_dir():
            files = (str(named / "vocabulary.json"), str(named / "merges.txt"))
            tokenizer = ByteLevelBPETokenizer.from_file(*files)._tokenizer
        else:
            tokenizer = Tokenizer.from_file(str(named))
    except Exception as error:  # the library raises bare exceptions
        refuse(f"--tokenizer {named}: {error}")
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    return tokenizer


def encode(tokenizer: Tokenizer, records: list[dict[str, Any]]) -> list[Pair]:
    end = tokenizer.token_to_id(END)
    sides = [tokenizer.encode_batch([record[field] for record in records]) for field in ("en", "de")]
    return [([*source.ids, end], [*target.ids, end]) for source, target in zip(*sides, strict=True)]


def make_model(tokenizer: Tokenizer, layers: tuple[int, int], width: int, dropout: float, device: str) -> MarianMTModel:
    size, pad = tokenizer.get_vocab_size(), tokenizer.token_to_id(PAD)
    config = MarianConfig(
        vocab_size=size,
        d_model=width,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        encoder_attention_heads=max(1, width // 32),
        decoder_attention_heads=max(1, width // 32),
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=512,
        dropout=dropout,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.token_to_id(END),
        forced_eos_token_id=None,
        decoder_start_token_id=pad,
        bos_token_id=None,
    )
    with torch.device(device):
        return MarianMTModel(config)


def num_weights(model: MarianMTModel) -> int:
    """What is learned: each shared weight once, no fixed positions."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def choose_width(tokenizer: Tokenizer, layers: tuple[int, int], num_params: int) -> int:
    """The multiple of 32 whose model comes closest to a number of weights."""
    counts = {width: num_weights(make_model(tokenizer, layers, width, 0.0, "meta")) for width in range(32, 1056, 32)}
    return min(counts, key=lambda width: abs(counts[width] - num_params))


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def batches(pairs: list[Pair], size: int, seed: int) -> Any:
    """Endless batches of pairs of like lengths, in another order each epoch."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(range(len(pairs)), len(pairs))
        chunks = [order[at : at + 50 * size] for at in range(0, len(order), 50 * size)]
        epoch = []
        for chunk in chunks:
            chunk.sort(key=lambda at: (len(pairs[at][1]), len(pairs[at][0])))
            epoch += [chunk[at : at + size] for at in range(0, len(chunk), size)]
        generator.shuffle(epoch)
        yield from ([pairs[at] for at in batch] for batch in epoch if len(batch) == size)


def logits(model: MarianMTModel, batch: list[Pair], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of each next token and the tokens, (batch, time, vocabulary) and (batch, time), -100 where nothing is."""
    sources, targets = padded([pair[0] for pair in batch], pad), padded([pair[1] for pair in batch], -100)
    # labels= would count each sequence alike; here every token does. The decoder sees the target one token late.
    begun = torch.cat([torch.full((len(batch), 1), pad), targets[:, :-1].clamp(min=0)], 1)
    out = model(input_ids=sources, attention_mask=(sources != pad).long(), decoder_input_ids=begun)
    return out.logits, targets


def loss_of(model: MarianMTModel, batch: list[Pair], pad: int, smoothing: float = 0.0) -> tuple[torch.Tensor, int]:
    scores, targets = logits(model, batch, pad)
    loss = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=smoothing, reduction="sum"
    )
    return loss, int((targets >= 0).sum())


@torch.no_grad()
def evaluate(model: MarianMTModel, pairs: list[Pair], pad: int) -> float:
    """Nats per token of the target."""
    model.eval()
    parts = [loss_of(model, pairs[at : at + 64], pad) for at in range(0, len(pairs), 64)]
    model.train()
    return sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts)


def train(
    model: MarianMTModel, train_pairs: list[Pair], valid_pairs: list[Pair], pad: int, options: Namespace
) -> float:
    """Trains, leaves the best weights in the model, and returns the seconds without evaluation."""
    optimizer = torch.optim.AdamW(
        model.parameters(), options.learning_rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=options.weight_decay
    )
    rows, best, best_loss = batches(train_pairs, options.global_batch_size, options.seed), None, math.inf
    seconds, num_tokens = 0.0, 0
    for step in range(1, options.steps + 1):
        started = time.perf_counter()
        done = max(0.0, (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps))
        factor = min(1.0, step / max(1, options.warmup_steps)) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        batch = next(rows)
        loss, count = loss_of(model, batch, pad, options.label_smoothing)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - started
        num_tokens += sum(len(source) + len(target) for source, target in batch)
        if step % options.evaluate_every == 0 or step == options.steps:
            found = evaluate(model, valid_pairs, pad)
            print(
                f"step {step:6,}/{options.steps:,} | loss {loss.item() / count:.4f} | valid {found:.4f} | "
                f"{seconds:.0f} s | {num_tokens / seconds:,.0f} tok/s | epoch "
                f"{step * options.global_batch_size / len(train_pairs):.1f}",
                flush=True,
            )
            if found < best_loss:
                best, best_loss = copy.deepcopy(model.state_dict()), found
    model.load_state_dict(best)
    print(f"trained {seconds:.1f} s, {num_tokens:,} tokens; best validation loss {best_loss:.4f}")
    return seconds


@torch.no_grad()
def translate(model: MarianMTModel, tokenizer: Tokenizer, pairs: list[Pair], num_beams: int, most: int) -> list[str]:
    model.eval()
    pad, outputs = tokenizer.token_to_id(PAD), [""] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda at: len(pairs[at][0]))
    for begin in range(0, len(order), 32):
        chosen = order[begin : begin + 32]
        sources = padded([pairs[at][0] for at in chosen], pad)
        rows = model.generate(
            input_ids=sources,
            attention_mask=(sources != pad).long(),
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=most,
        )
        for at, row in zip(chosen, rows.tolist(), strict=True):
            outputs[at] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return outputs


def parse() -> Namespace:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder that `translation.py data` wrote")
    add("--output", type=Path, required=True, help="folder of greedy.jsonl and beam4.jsonl")
    add("--tokenizer", type=Path, help="tokenizer.json, or a bpe:FOLDER of tfdp (default: one is trained)")
    add("--vocabulary", type=int, default=4096, help="tokens of the tokenizer that is trained (default: 4096)")
    add("--num_params", type=int, help="weights of the model: chooses the width")
    add("--encoder_layers", type=int, default=3)
    add("--decoder_layers", type=int, default=3)
    add("--width", type=int, default=256, help="without --num_params; a multiple of 32 (default: 256)")
    add("--steps", type=int, default=2000)
    add("--global_batch_size", type=int, default=64, help="pairs a step (default: 64)")
    add("--learning_rate", type=float, default=1e-3, help="choose it on valid.jsonl (default: 0.001)")
    add("--warmup_steps", type=int, default=200)
    add("--weight_decay", type=float, default=0.01)
    add("--clip_norm", type=float, default=1.0)
    add("--dropout", type=float, default=0.1)
    add("--label_smoothing", type=float, default=0.1)
    add("--evaluate_every", type=int, default=200)
    add("--max_tokens", type=int, default=128, help="longest translation")
    add("--num_examples", type=int, help="translate so many of the test file alone (default: all), without BLEU")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("steps", "global_batch_size", "evaluate_every", "threads", "encoder_layers", "decoder_layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.width % 32 or options.width < 32:
        parser.error("--width must be a multiple of 32")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    parts = {name: read(options.data / f"{name}.jsonl", "en", "de") for name in ("train", "valid", "test")}
    texts = [record[field] for record in parts["train"] for field in ("en", "de")]
    tokenizer = load_tokenizer(options.tokenizer, options.vocabulary, texts)
    pairs = {name: encode(tokenizer, records) for name, records in parts.items()}
    if options.global_batch_size > len(pairs["train"]):
        refuse(f"--global_batch_size {options.global_batch_size} is more than the {len(pairs['train'])} training pairs")
    layers = (options.encoder_layers, options.decoder_layers)
    width = choose_width(tokenizer, layers, options.num_params) if options.num_params else options.width
    model = make_model(tokenizer, layers, width, options.dropout, "cpu")
    print(
        f"Marian, {layers[0]} + {layers[1]} layers of width {width}, {num_weights(model):,} weights, "
        f"{tokenizer.get_vocab_size():,} tokens; {options.threads} threads, {' '.join(sys.argv[1:])}"
    )
    train(model, pairs["train"], pairs["valid"], tokenizer.token_to_id(PAD), options)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, num_beams in (("greedy", 1), ("beam4", 4)):
        started, path = time.perf_counter(), options.output / f"{name}.jsonl"
        write_outputs(
            path, translate(model, tokenizer, pairs["test"][: options.num_examples], num_beams, options.max_tokens)
        )
        print(f"{name}: {path}, {time.perf_counter() - started:.1f} s")
        if options.num_examples is None:
            translation.score(path, options.data / "test.jsonl")


if __name__ == "__main__":
    main()
