"""Questions on short stories: `python benchmarks/yardsticks/questions.py data --output DIR`.

    data      writes train.jsonl, valid.jsonl and test.jsonl: {"context": ..., "question": ..., "answer": ..., ...}
    score     --predictions FILE --test FILE: exact match and F1 as SQuAD counts them (Rajpurkar et al. 2016)
    baseline  --data DIR: the same for the most frequent answer of each kind of question

Stories and questions are made by rule, after the model of bAbI (Weston et al. 2015), so that the answer stands in the
story alone. Five kinds: `where` someone is (the last of two journeys), `what` someone has (an article, colour, thing),
`who` has a thing, `when` someone came (a day), `how many` things someone has after another gave some. A story has one
to four sentences about up to three persons; the short ones teach to copy, which the long ones need. About a quarter
of the persons occur in no story of train: half of the stories of valid and test are told of them alone, so that a model
has to read the names, and `score` tells both halves apart.

Each choice is a function of the number of the story, by hash, and no question with its story is on two sides.
"""

import hashlib
from collections import Counter
from pathlib import Path

from scores import exact_match, report, squad_f1
from splits import Record, add_data, add_score, commands, drop_shared, place, read, read_outputs, write

# Many names, so that a model cannot know them all by heart and has to copy: with 27 it did not read new ones.
ONSETS = (
    *("Al", "Ben", "Cor", "Dar", "El", "Fin", "Gar", "Hel", "Ing", "Jon", "Kar", "Lor", "Mar", "Nor", "Os", "Per"),
    *("Ros", "Sel", "Tam", "Ver", "Wil", "Yor", "Zen", "Bru"),
)
ENDINGS = ("a", "ak", "ela", "en", "ias", "ina", "is", "o", "on", "or", "us", "yn")
NAMES = tuple(onset + ending for onset in ONSETS for ending in ENDINGS)
UNSEEN = tuple(name for name in NAMES if place(f"unseen {name}") < 0.25)
SEEN = tuple(name for name in NAMES if name not in UNSEEN)
PLACES = ("kitchen", "garden", "office", "school", "library", "market", "station", "park", "museum", "harbour")
THINGS = ("ball", "book", "lamp", "coat", "cup", "bag", "hat", "key", "map", "pen", "box", "drum")
COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "grey")
GOODS = ("apples", "nuts", "coins", "plums", "eggs", "stamps", "stones", "shells")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
KINDS = ("where", "what", "who", "when", "how many")


class Choices:
    """Choices that depend on a name and on their number alone."""

    def __init__(self, name: str):
        self.name, self.count = name, 0

    def number(self, below: int) -> int:
        self.count += 1
        digest = hashlib.blake2b(f"{self.name} {self.count}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % below

    def some(self, options: tuple[str, ...], count: int) -> list[str]:
        """So many different ones, in a random order."""
        left = list(options)
        return [left.pop(self.number(len(left))) for _ in range(count)]


def story(number: int, names: tuple[str, ...]) -> Record:
    """One story, its question and its answer."""
    choices = Choices(f"story {number}")
    kind = KINDS[number % len(KINDS)]
    (one, two, three), (here, there, yonder) = choices.some(names, 3), choices.some(PLACES, 3)
    (thing, other), colours = choices.some(THINGS, 2), choices.some(COLOURS, 2)
    days, (goods,) = choices.some(DAYS, 2), choices.some(GOODS, 1)
    amounts = [2 + choices.number(6), 2 + choices.number(4)]
    travels = [f"{one} went to the {here}.", f"{two} went to the {there}.", f"{one} came back to the {yonder}."]
    holdings = [f"{two} has a {colours[0]} {thing}.", f"{three} has a {colours[1]} {other}."]
    visits = [f"{one} came on {days[0]}.", f"{three} came on {days[1]}."]
    gifts = [f"{one} had {amounts[0]} {goods}.", f"{two} gave {one} {amounts[1]} more {goods}."]
    picked, person = choices.number(2), [two, three]
    needed, others, question, answer = {
        "where": (
            [travels[0], travels[2]] if picked == 0 else travels[1:2],
            travels[1:2] + holdings if picked == 0 else [travels[0], travels[2], holdings[0]],
            f"Where is {(one, two)[picked]}?",
            f"the {(yonder, there)[picked]}",
        ),
        "what": (
            holdings[picked : picked + 1],
            holdings[1 - picked : 2 - picked] + visits,
            f"What does {person[picked]} have?",
            f"a {colours[picked]} {(thing, other)[picked]}",
        ),
        "who": (
            holdings[picked : picked + 1],
            holdings[1 - picked : 2 - picked] + travels[:2],
            f"Who has the {(thing, other)[picked]}?",
            person[picked],
        ),
        "when": (
            visits[picked : picked + 1],
            visits[1 - picked : 2 - picked] + holdings,
            f"When did {(one, three)[picked]} come?",
            f"on {days[picked]}",
        ),
        "how many": (gifts, holdings, f"How many {goods} does {one} have?", str(sum(amounts))),
    }[kind]
    told = needed + others[: choices.number(len(others) + 1)]
    # Sentences may stand in any order, but for those that follow from each other.
    fixed = [line for line in travels + gifts if line in told]
    order = iter(fixed)
    mixed = [next(order) if line in fixed else line for line in choices.some(tuple(told), len(told))]
    return {
        "context": " ".join(mixed),
        "question": question,
        "answer": answer,
        "context_and_question": " ".join([*mixed, question]),
        "kind": kind,
        "names": "seen" if names == SEEN else "unseen",
    }


def make_data(sizes: dict[str, int], output: Path) -> None:
    """Half of the held-out stories are of persons that train has none of."""
    parts: dict[str, list[Record]] = {}
    for at, (name, size) in enumerate(sizes.items()):
        first = at * 10_000_000
        halves = (SEEN, SEEN) if name == "train" else (SEEN, UNSEEN)
        parts[name] = [story(first + number, halves[number // len(KINDS) % 2]) for number in range(size)]
    dropped = drop_shared(parts, lambda record: (record["context_and_question"],))
    print(f"{len(SEEN)} names in train, {len(UNSEEN)} others in half of valid and test; {dropped} stories told twice")
    write(output, parts, ("context_and_question", "answer"))


def score(outputs: list[str], tests: list[Record]) -> dict[str, float]:
    """Prints exact match and F1 of all, exact match of known and new names, and of each kind of question."""
    pairs = [(output, record["answer"]) for output, record in zip(outputs, tests, strict=True)]
    exact = [(exact_match(*pair), 1.0) for pair in pairs]
    found = {
        "exact match": report("exact match", exact),
        "F1": report("F1", [(squad_f1(*pair), 1.0) for pair in pairs]),
    }
    for field in ("names", "kind"):
        for value in dict.fromkeys(record[field] for record in tests):
            chosen = [part for part, record in zip(exact, tests, strict=True) if record[field] == value]
            found[value] = report(f"exact, {field} {value}"[:20], chosen)
    return found


def baseline(folder: Path) -> dict[str, float]:
    """The scores of the most frequent answer of each kind of question in train."""
    counts: dict[str, Counter[str]] = {}
    for record in read(folder / "train.jsonl", "kind", "answer"):
        counts.setdefault(record["kind"], Counter())[record["answer"]] += 1
    tests = read(folder / "test.jsonl", "kind", "answer", "names")
    return score([counts[record["kind"]].most_common(1)[0][0] for record in tests], tests)


def main() -> None:
    parser, subcommands = commands(__doc__)
    data = add_data(subcommands)
    data.add_argument("--num_train", type=int, default=20_000, help="training stories (default: 20000)")
    other = subcommands.add_parser("baseline", help="scores of the most frequent answer")
    other.add_argument("--data", type=Path, required=True, help="the folder that `data` wrote")
    add_score(subcommands, "exact match and F1 of predictions")
    arguments = parser.parse_args()
    if arguments.command == "data":
        make_data({"test": 2_000, "valid": 500, "train": arguments.num_train}, arguments.output)
    elif arguments.command == "baseline":
        baseline(arguments.data)
    else:
        tests = read(arguments.test, "answer", "kind", "names")
        score(read_outputs(arguments.predictions, len(tests)), tests)


if __name__ == "__main__":
    main()
