"""Six synthetic tasks, each solved by several strategies that share the answer and differ in the trace.

    python tasks.py                        # prints one worked example of every strategy
    python tasks.py traces.jsonl           # prints what a file of traces holds

A trace is a deterministic function of (x, strategy), but for its wording, if a task has several. Inputs x, outputs y
and answers are lists of string tokens; y is a sequence of steps, each closed by ';', then 'ans' and the answer.
Strategy names exist to make the data for the base model and to score results; factorize.py never reads them.
"""
import itertools
import math
import random
import re
import signal
import sys
import zlib
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

from harness import traces
from harness.config import any_terminal

SPECIALS = ("<pad>", "<bos>", "<eos>", "<x>", "</x>", "<z>", "</z>", "<y>", "</y>", "<z_empty>")
PAD, BOS, EOS, X, X_END, Z, Z_END, Y, Y_END, Z_EMPTY = range(len(SPECIALS))
DIGITS = tuple("0123456789")


class Tokenizer:
    """Maps string tokens to ids: special tokens, task vocabulary, then <z1> ... <zK> once a base is factorized."""

    def __init__(self, vocab, n_latents=0):
        self.vocab, self.n_latents = tuple(vocab), n_latents
        self.tokens = SPECIALS + self.vocab + tuple(f"<z{k + 1}>" for k in range(n_latents))
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        assert len(self.ids) == len(self.tokens), f"duplicate tokens in the vocabulary {self.tokens}"
        self.first_latent = len(SPECIALS) + len(self.vocab)  # id of <z1>
        # longest token first, so that 'right' is one token and '42' is two digits unless '42' is a token
        self._split = re.compile("|".join(re.escape(t) for t in sorted(self.vocab, key=len, reverse=True)))

    def __len__(self):
        return len(self.tokens)

    def encode(self, tokens):
        return [self.ids[t] for t in tokens]

    def decode(self, ids):
        return [self.tokens[i] for i in ids]

    def split(self, text, words=str.split):
        """Turns typed text ("47 + 38") into task tokens; raises ValueError naming the first piece that is none."""
        tokens = []
        for word in words(text):
            while word:
                match = self._split.match(word)
                if not match:
                    raise ValueError(f"'{word}' is not in the task's vocabulary: {' '.join(self.vocab)}")
                tokens.append(match.group())
                word = word[match.end():]
        return tokens

    def prompt(self, x, latent=None, continuous=False):
        """Ids of the canonical prompt <bos> <x> ... </x> <y>, or the generator's: <bos> <x> ... </x> <z> z </z> <y>,
        with <z_empty> as z where latents are continuous."""
        z = Z_EMPTY if continuous else None if latent is None else self.first_latent + latent
        section = [] if z is None else [Z, z, Z_END]
        return [BOS, X, *self.encode(x), X_END, *section, Y]

    def solution(self, ids):
        """The tokens of a y that `ids` begin with: up to </y>, or all of them where it never ends."""
        return self.decode(ids[:ids.index(Y_END)] if Y_END in ids else [i for i in ids if i != PAD])

    def record(self, x, y):
        """Ids of the canonical record <bos> <x> ... </x> <y> ... </y> <eos>."""
        return [*self.prompt(x), *self.encode(y), Y_END, EOS]


class Parsed(NamedTuple):
    steps: list | None  # list of token lists, None when y cannot be parsed
    answer: list | None  # tokens after 'ans'
    reason: str | None  # why y cannot be parsed


@dataclass(frozen=True)
class Task:
    """One task: how to draw an input, its answer, and one function per strategy that lists the steps."""
    name: str
    vocab: tuple  # task tokens, without the special ones
    draw: Callable  # rng -> x, also one on which strategies coincide; or None: draw again
    check: Callable  # x -> None or the reason why x is no input of this task
    answer: Callable  # x -> the answer, task tokens
    steps: dict  # strategy name -> (x -> list of steps, each a list of tokens or a text whose characters are tokens)
    kind: Callable = lambda x: "all"  # x -> name of the kind of input it is, on which the mixture may depend
    weights: list | dict | None = None  # of the strategies in the data, or a list of them for every kind; None: equal
    separators: tuple = (";",)  # any of which may close a step
    commute: bool = False  # whether a + b may be written b + a
    distinct: bool = True  # leave out inputs on which two strategies leave the same trace
    draw_any: Callable | None = None  # what draws inputs if they are not left out; default: draw
    records: dict | None = None  # of a file of traces (`traces_task`): the text of x -> its harness.traces.Record
    tokens: Callable = str.split  # text -> its tokens
    data: int | None = None  # of a file: a sum over all x and y, which labels do not change

    strategies = property(lambda self: tuple(self.steps))
    solutions_each = property(lambda self: len(self.steps) if self.records is None else 1)  # of `solutions`, at most

    def mixture(self, x):
        """The strategies of the data on x, strategy -> share, without those of share 0; in a file, of its labels."""
        if self.records is not None:
            labels = [r.strategy for r in self.records_of(x) if r.strategy]
            return {s: labels.count(s) / len(labels) for s in self.strategies if s in labels}
        row = self.weights[self.kind(x)] if isinstance(self.weights, dict) else self.weights
        row = row or len(self.steps) * [1.0]
        return {s: w / sum(row) for s, w in zip(self.strategies, row) if w / sum(row)}

    def trace(self, x, strategy):
        """The solution y of x by `strategy`: its steps, then the answer; of all wordings the canonical one."""
        return self.canonical([t for step in self.steps[strategy](x) for t in (*step, ";")] + ["ans", *self.answer(x)])

    def text(self, tokens):
        return ("" if self.tokens is list else " ").join(tokens)

    def records_of(self, x):
        """The records of a file that answer x, of which there are none if somebody typed it."""
        return self.records.get(self.text(x), [])

    def traces(self, x):
        """What the data has for x: different (strategy, y); strategy is None where a file has no label."""
        if self.records is not None:
            return [(s, self.tokens(y)) for s, y in dict.fromkeys((r.strategy, r.y) for r in self.records_of(x))]
        return [(s, self.trace(x, s)) for s in self.mixture(x)]

    def solutions(self, x, rng):
        """What a base learns of x: (y, weight) pairs, and the entropy of y in nats. Weighted, they have the exact loss:
        which strategy was drawn makes no noise. Of a file, one draw of its records, as they are; nobody knows their
        entropy (nan)."""
        if self.records is not None:
            return [(self.tokens(rng.choice(self.records_of(x)).y), 1.0)], math.nan
        mixture, traces, found, entropy = self.mixture(x), dict(self.traces(x)), [], 0.0
        for strategy, share in mixture.items():
            y, nats = self.word(traces[strategy], rng)
            found.append((y, share))
            alike = sum(mixture[s] for s in traces if traces[s] == traces[strategy])  # the share of this very trace
            entropy += share * (nats - math.log(alike))
        return found, entropy

    def ways(self, y):
        """For every step of a canonical y, and for its answer, the equally likely ways to write it."""
        if len(self.separators) == 1 and not self.commute:
            return [[y]]
        *steps, answer = (step.split() for step in " ".join(y).split(" ; "))
        orders = [[step, swapped(step)] if self.commute and swapped(step) != step else [step] for step in steps]
        return [*([[*order, end] for order in each for end in self.separators] for each in orders), [answer]]

    def word(self, y, rng):
        """One wording of a canonical y, each equally likely, and the log of their number."""
        ways = self.ways(y)
        drawn = [each[0] if len(each) == 1 else rng.choice(each) for each in ways]
        return list(itertools.chain(*drawn)), math.log(math.prod(map(len, ways)))

    def wordings(self, y, rng, most=16):
        """Wordings of a canonical y, each with how many it stands for: all of them, or `most` that are drawn."""
        ways = self.ways(y)
        n = math.prod(map(len, ways))
        if n > most:
            return [(self.word(y, rng)[0], n / most) for _ in range(most)]
        return [(list(itertools.chain(*each)), 1.0) for each in itertools.product(*ways)]

    def canonical(self, y):
        """y with ';' after every step and, if they commute, the smaller one of two addends first."""
        y = [";" if t in self.separators else t for t in y]
        if not self.commute:
            return y
        steps = " ".join(y).split(" ; ")
        return " ; ".join(" ".join(min(s.split(), swapped(s.split()), key=addends)) for s in steps).split()

    def is_valid_input(self, x):
        """True if no two strategies leave the same trace on x, or if that does not matter."""
        traces = [tuple(y) for _, y in self.traces(x)] if self.distinct else []
        return len(set(traces)) == len(traces)

    def split(self, x):
        """'test' for about one input in ten, 'validation' for one in twenty, else 'train', by a hash of x: the same for
        every process, seed and order."""
        place = zlib.crc32(" ".join(x).encode()) % 20
        return "test" if place % 10 == 0 else "validation" if place == 1 else "train"

    def sample_input(self, rng, split=None):
        """Draws x with random.Random `rng`, of one split or (None) of all. Raises ValueError where the task's sizes
        leave no input on which all strategies differ."""
        for _ in range(100_000):  # a small share of the draws may do, of large grids with small distances, say
            x = self.draw(rng) if self.distinct or not self.draw_any else self.draw_any(rng)
            if x and split in (None, self.split(x)) and self.is_valid_input(x):
                return x
        raise ValueError(f"{self.name} of these sizes has no {split or ''} input on which all strategies differ")

    def parse(self, y):
        """Splits y into steps and answer, or says in `reason` why it cannot."""
        y = self.canonical(y)
        if "ans" not in y:
            return Parsed(None, None, "no answer section")
        cut = y.index("ans")
        answer = y[cut + 1:]
        *steps, rest = (step.split() for step in " ".join(y[:cut]).split(";"))
        if rest:
            return Parsed(None, None, "the steps do not end with ';'")
        if not all(steps):
            return Parsed(None, None, "empty step")
        if not answer or any(t in (";", "ans") or t not in self.vocab for t in answer):
            return Parsed(None, None, "malformed answer")
        return Parsed(steps, answer, None)

    def is_trace(self, x, y):
        """Whether the data has y for x."""
        return self.canonical(y) in [trace for _, trace in self.traces(x)]

    def attribute(self, x, y):
        """The strategy whose trace equals y in its canonical wording (the first of several), or None."""
        return next(iter(self.all_strategies(x, y)), None)

    def all_strategies(self, x, y):
        """All strategies whose trace equals y: more than one where strategies coincide."""
        y = self.canonical(y)
        return [s for s, trace in self.traces(x) if s and trace == y]

    def nearest_strategy(self, x, y):
        """Diagnostic: the strategy whose trace shares the longest prefix with y (the first of equals), or None."""
        y = self.canonical(y)
        return max(((s, trace) for s, trace in self.traces(x) if s), key=lambda each: shared(each[1], y),
                   default=(None, None))[0]

    def nearness(self, x, y, strategy):
        """The part of the trace of `strategy` on x with which y begins, from 0 to 1."""
        y = self.canonical(y)
        return max(shared(trace, y) / max(len(trace), len(y)) for s, trace in self.traces(x) if s == strategy)


def shared(a, b):
    """How many tokens two lists have in common before they part."""
    return next((i for i, (s, t) in enumerate(zip(a, b)) if s != t), min(len(a), len(b)))


def number(n):
    """18 -> ['1', '8']: every number is written digit by digit, most significant first."""
    return list(str(n))


def read_numbers(tokens, *separators):
    """['4', '7', '+', '3', '8'], '+' -> [47, 38]; None unless there is one number, of at most 100 digits, before,
    between and after the separators."""
    number = "(0|[1-9][0-9]{0,99})"  # int() takes no more than 4300 digits
    match = re.fullmatch(number.join(("", *map(re.escape, separators), "")), "".join(tokens))
    return match and [int(n) for n in match.groups()]


def addition(a, b):
    return f"{a}+{b}={a + b}"


def addends(step):
    """['1', '0', '+', '7', '=', '1', '7'] -> [10, 7]; [] where a step is not the sum of two numbers."""
    return read_numbers(step[:step.index("=")], "+") or [] if step.count("+") == step.count("=") == 1 else []


def swapped(step):
    """A step with its two addends in the other order, if it has two."""
    if len(addends(step)) != 2:
        return step
    plus, equals = step.index("+"), step.index("=")
    return [*step[plus + 1:equals], "+", *step[:plus], *step[equals:]]


def on_numbers(f, *separators):
    """f of numbers, as a function of the tokens that they stand in."""
    return lambda x: f(*read_numbers(x, *separators))


def list_summation(min_len=4, max_len=5, max_value=9):
    """x = 3 5 2 7
    left-to-right   3 + 5 = 8 ; 8 + 2 = 1 0 ; 1 0 + 7 = 1 7 ; ans 1 7
    right-to-left   7 + 2 = 9 ; 9 + 5 = 1 4 ; 1 4 + 3 = 1 7 ; ans 1 7
    pairwise        3 + 5 = 8 ; 2 + 7 = 9 ; 8 + 9 = 1 7 ; ans 1 7
    """
    def draw(rng):
        return [str(rng.randint(1, max_value)) for _ in range(rng.randint(min_len, max_len))]

    def check(x):
        if not min_len <= len(x) <= max_len or not set(x) <= set(DIGITS[1:max_value + 1]):
            return f"expected {min_len} to {max_len} digits between 1 and {max_value}"

    def running(x):
        values = list(map(int, x))
        return [addition(total, value) for total, value in zip(itertools.accumulate(values), values[1:])]

    def pairwise(x):
        values, steps = list(map(int, x)), []
        while len(values) > 1:
            steps += [addition(a, b) for a, b in zip(values[::2], values[1::2])]
            values = [sum(values[i:i + 2]) for i in range(0, len(values), 2)]
        return steps

    return Task("list_summation", (*DIGITS, "+", "=", ";", "ans"), draw, check,
                answer=lambda x: number(sum(map(int, x))),
                steps={"left-to-right": running, "right-to-left": lambda x: running(x[::-1]), "pairwise": pairwise},
                kind=lambda x: f"{len(x)} numbers")


# Each algorithm sorts a list in place, and yields after every step.
def swap(a, i, j):
    a[i], a[j] = a[j], a[i]


def bubble_sort(a):
    for end in range(len(a) - 1, 0, -1):
        for i in range(end):
            if a[i] > a[i + 1]:
                swap(a, i, i + 1)
                yield


def selection_sort(a):
    for i in range(len(a) - 1):
        swap(a, i, a.index(min(a[i:])))
        yield


def insertion_sort(a):
    for i in range(len(a)):
        a[:i + 1] = sorted(a[:i + 1])
        yield


def merge_sort(a):
    width = 1
    while width < len(a):
        for i in range(0, len(a), 2 * width):
            a[i:i + 2 * width] = sorted(a[i:i + 2 * width])  # both runs are sorted: this is their merge
            yield
        width *= 2


def heap_sort(a):
    """Williams 1964: grow a max-heap in a[:end], one element at a time, then take its top away."""
    for i in range(1, len(a)):
        while i and a[i] > a[(i - 1) // 2]:  # up, until its parent is larger
            swap(a, i, (i - 1) // 2)
            yield
            i = (i - 1) // 2
    for end in range(len(a) - 1, 0, -1):
        swap(a, 0, end)
        yield
        i, children = 0, range(1, min(3, end))
        while children and a[i] < a[child := max(children, key=a.__getitem__)]:  # down, until its children are smaller
            swap(a, i, child)
            yield
            i, children = child, range(2 * child + 1, min(2 * child + 3, end))


def sorting_algorithms(min_len=4, max_len=6, max_value=9):
    """x = 4 2 3 1; each step is the whole list after a change
    bubble-sort     2 4 3 1 ; 2 3 4 1 ; 2 3 1 4 ; 2 1 3 4 ; 1 2 3 4 ; ans 1 2 3 4          (adjacent swaps)
    selection-sort  1 2 3 4 ; ans 1 2 3 4                                    (smallest of the rest to the front)
    insertion-sort  2 4 3 1 ; 2 3 4 1 ; 1 2 3 4 ; ans 1 2 3 4                (next element into the sorted prefix)
    merge-sort      2 4 3 1 ; 2 4 1 3 ; 1 2 3 4 ; ans 1 2 3 4                (runs of 1, 2, 4, ... merged)
    heap-sort       1 2 3 4 ; 3 2 1 4 ; 1 2 3 4 ; 2 1 3 4 ; 1 2 3 4 ; ans 1 2 3 4  (max-heap, then its top to the end)
    """
    def draw(rng, tries=20):  # strategies coincide on many short lists: with a single try, long ones would prevail
        length = rng.randint(min_len, max_len)
        for _ in range(tries):
            x = [str(v) for v in rng.sample(range(max_value + 1), length)]
            if task.is_valid_input(x):
                break
        return x

    def check(x):
        if not min_len <= len(x) <= max_len or len(set(x)) < len(x) or any(t not in vocab[:max_value + 1] for t in x):
            return f"expected {min_len} to {max_len} different numbers between 0 and {max_value}"

    def changes(sort):  # x -> the list after every step that changed it
        def steps(x):
            a = [int(t) for t in x]
            states = [list(x), *([str(v) for v in a] for _ in sort(a))]
            return [after for before, after in zip(states, states[1:]) if after != before]
        return steps

    vocab = (*map(str, range(max_value + 1)), ";", "ans")
    task = Task("sorting_algorithms", vocab, draw, check,
                answer=lambda x: sorted(x, key=int),
                steps={"bubble-sort": changes(bubble_sort), "selection-sort": changes(selection_sort),
                       "insertion-sort": changes(insertion_sort), "merge-sort": changes(merge_sort),
                       "heap-sort": changes(heap_sort)},
                kind=lambda x: f"{len(x)} numbers", draw_any=lambda rng: draw(rng, tries=1))
    return task


def grid_pathfinding(side=16, max_distance=5):
    """x = 3 4 to 5 6 (start row and column, goal row and column); each step is a move and the cell it reaches
    right-first     right 3 5 ; right 3 6 ; down 4 6 ; down 5 6 ; ans 4      (the answer: the length of the path)
    down-first      down 4 4 ; down 5 4 ; right 5 5 ; right 5 6 ; ans 4
    alternating     right 3 5 ; down 4 5 ; right 4 6 ; down 5 6 ; ans 4
    """
    def draw(rng):
        (row, row_goal), (col, col_goal) = (sorted(rng.sample(range(side), 2)) for _ in range(2))
        x = [str(row), str(col), "to", str(row_goal), str(col_goal)]
        return x if check(x) is None else None

    def check(x):
        if len(x) != 5 or x[2] != "to" or any(t not in vocab[:side] for t in (*x[:2], *x[3:])):
            return f"expected 'row column to row column' with coordinates between 0 and {side - 1}"
        if not all(0 <= d <= max_distance for d in distances(x)):
            return f"the goal must lie at most {max_distance} cells right of and below the start"

    def distances(x):  # (to the right, down)
        row, col, _, row_goal, col_goal = x
        return int(col_goal) - int(col), int(row_goal) - int(row)

    def walk(x, moves):
        row, col, steps = int(x[0]), int(x[1]), []
        for move in moves:
            row, col = row + (move == "down"), col + (move == "right")
            steps.append([move, str(row), str(col)])
        return steps

    def alternating(right, down):
        both = min(right, down)
        return ["right", "down"] * both + ["right"] * (right - both) + ["down"] * (down - both)

    vocab = (*map(str, range(max(side, 2 * max_distance + 1))), "right", "down", "to", ";", "ans")
    return Task("grid_pathfinding", vocab, draw, check,
                answer=lambda x: [str(sum(distances(x)))],
                steps={"right-first": lambda x: walk(x, ["right"] * distances(x)[0] + ["down"] * distances(x)[1]),
                       "down-first": lambda x: walk(x, ["down"] * distances(x)[1] + ["right"] * distances(x)[0]),
                       "alternating": lambda x: walk(x, alternating(*distances(x)))},
                kind=lambda x: "wide" if distances(x)[0] > distances(x)[1] else "tall or square")


def linear_equation_solving(max_factor=9, max_root=12, max_offset=30):
    """x = 3 x + 5 = 2 0
    subtract-then-divide   3 x = 2 0 - 5 ; 3 x = 1 5 ; x = 1 5 / 3 ; x = 5 ; ans 5
    divide-then-subtract   x + 5 / 3 = 2 0 / 3 ; x = 2 0 / 3 - 5 / 3 ; x = 1 5 / 3 ; x = 5 ; ans 5
    inverse-ops            2 0 - 5 = 1 5 ; 1 5 / 3 = 5 ; ans 5
    """
    def draw(rng):
        a, root, b = rng.randint(2, max_factor), rng.randint(1, max_root), rng.randint(1, max_offset)
        return list(f"{a}x+{b}={a * root + b}")

    def check(x):
        numbers = read_numbers(x, "x+", "=")
        if not numbers:
            return "expected 'a x + b = c'"
        a, b, c = numbers
        if not (2 <= a <= max_factor and 1 <= b <= max_offset and (c - b) % a == 0 and 1 <= (c - b) // a <= max_root):
            return (f"expected a x + b = c with a between 2 and {max_factor}, b between 1 and {max_offset}, "
                    f"and a whole x between 1 and {max_root}")

    def subtract_then_divide(a, b, c):
        return [f"{a}x={c}-{b}", f"{a}x={c - b}", f"x={c - b}/{a}", f"x={(c - b) // a}"]

    def divide_then_subtract(a, b, c):
        return [f"x+{b}/{a}={c}/{a}", f"x={c}/{a}-{b}/{a}", f"x={c - b}/{a}", f"x={(c - b) // a}"]

    def inverse_ops(a, b, c):
        return [f"{c}-{b}={c - b}", f"{c - b}/{a}={(c - b) // a}"]

    return Task("linear_equation_solving", (*DIGITS, "x", "+", "-", "/", "=", ";", "ans"), draw, check,
                answer=on_numbers(lambda a, b, c: number((c - b) // a), "x+", "="),
                steps={"subtract-then-divide": on_numbers(subtract_then_divide, "x+", "="),
                       "divide-then-subtract": on_numbers(divide_then_subtract, "x+", "="),
                       "inverse-ops": on_numbers(inverse_ops, "x+", "=")},
                kind=on_numbers(lambda a, b, c: "small factor" if a < 6 else "large factor", "x+", "="))


def base_conversion(min_value=16, max_value=511):
    """x = 1 8 2 base 1 6
    repeated-division   1 8 2 / 1 6 = 1 1 r 6 ; 1 1 / 1 6 = 0 r b ; ans b 6             (remainders, last one first)
    via-binary          1 8 2 = 1 0 1 1 0 1 1 0 ; 1 0 1 1 = b ; 0 1 1 0 = 6 ; ans b 6   (4 bits a digit in base 16)
    decomposition       1 8 2 = b * 1 6 + 6 ; 6 = 6 * 1 + 0 ; ans b 6                   (largest power first)
    """
    if min_value < 1:
        raise ValueError("0 leaves repeated division without a step: min_value must be at least 1")

    def draw(rng):
        return [*number(rng.randint(min_value, max_value)), "base", *number(rng.choice((4, 8, 16)))]

    def check(x):
        numbers = read_numbers(x, "base")
        if not numbers or not min_value <= numbers[0] <= max_value or numbers[1] not in (4, 8, 16):
            return f"expected 'n base b' with n between {min_value} and {max_value} and b one of 4, 8, 16"

    def digits(n, base):
        return (digits(n // base, base) if n >= base else []) + [f"{n % base:x}"]

    def repeated_division(n, base):
        steps = []
        while n:
            steps.append(f"{n}/{base}={n // base}r{n % base:x}")
            n //= base
        return steps

    def via_binary(n, base):
        width = base.bit_length() - 1  # bits of a digit
        return [f"{n}={n:b}", *(f"{int(d, 16):0{width}b}={d}" for d in digits(n, base))]

    def decomposition(n, base):
        steps = []
        for power in reversed(range(len(digits(n, base)))):
            rest = n % base ** power
            steps.append(f"{n}={n // base ** power:x}*{base ** power}+{rest}")
            n = rest
        return steps

    return Task("base_conversion", (*DIGITS, *"abcdef", "base", "r", "/", "*", "+", "=", ";", "ans"), draw, check,
                answer=on_numbers(digits, "base"),
                steps={"repeated-division": on_numbers(repeated_division, "base"),
                       "via-binary": on_numbers(via_binary, "base"),
                       "decomposition": on_numbers(decomposition, "base")},
                kind=on_numbers(lambda n, base: f"base {base}", "base"))


def multidigit_addition(min_digits=1, max_digits=2):
    """x = 4 7 + 3 8
    right-to-left-carry      7 + 8 + 0 = 5 carry 1 ; 4 + 3 + 1 = 8 carry 0 ; ans 8 5
    left-to-right-partials   4 0 + 3 0 = 7 0 ; 7 + 8 = 1 5 ; 7 0 + 1 5 = 8 5 ; ans 8 5
    rounding-decomposition   3 8 + 2 = 4 0 ; 4 7 + 4 0 = 8 7 ; 8 7 - 2 = 8 5 ; ans 8 5
    """
    def draw(rng):
        a, b = (rng.randrange(10 ** (n - 1), 10 ** n) for n in (rng.randint(min_digits, max_digits) for _ in range(2)))
        return list(f"{a}+{b}") if max(a, b) > 9 else None

    def check(x):
        numbers = read_numbers(x, "+")
        if (not numbers or min(numbers) < 1 or max(numbers) < 10
                or not all(min_digits <= len(str(n)) <= max_digits for n in numbers)):
            return f"expected 'a + b', each above 0, of {min_digits} to {max_digits} digits, and one of 2 or more"

    def right_to_left_carry(a, b):
        steps, carry = [], 0
        for place in range(len(str(max(a, b)))):
            da, db = a // 10 ** place % 10, b // 10 ** place % 10
            after, digit = divmod(da + db + carry, 10)
            steps.append([*f"{da}+{db}+{carry}={digit}", "carry", str(after)])
            carry = after
        return steps

    def left_to_right_partials(a, b):
        steps, total = [], 0
        for place in reversed(range(len(str(max(a, b))))):
            da, db = (n // 10 ** place % 10 * 10 ** place for n in (a, b))
            steps.append(addition(da, db))
            if total:
                steps.append(addition(total, da + db))
            total += da + db
        return steps

    def rounding_decomposition(a, b):
        excess = -b % 10
        return [addition(b, excess), addition(a, b + excess), f"{a + b + excess}-{excess}={a + b}"]

    return Task("multidigit_addition", (*DIGITS, "+", "-", "=", "carry", ";", "ans"), draw, check,
                answer=on_numbers(lambda a, b: number(a + b), "+"),
                steps={"right-to-left-carry": on_numbers(right_to_left_carry, "+"),
                       "left-to-right-partials": on_numbers(left_to_right_partials, "+"),
                       "rounding-decomposition": on_numbers(rounding_decomposition, "+")},
                kind=on_numbers(lambda a, b: "first larger" if a > b else "second larger or equal", "+"))


def traces_task(path):
    """The task of a file of traces, which harness/traces.py reads. It has no strategies where no record has a label."""
    rows, chars = traces.read(path)
    tokens, records = list if chars else str.split, {}
    for row in rows:
        records.setdefault(row.x, []).append(row)
    task = Task(path, (), draw=lambda rng: tokens(rng.choice(rows).x), check=lambda x: None, answer=lambda x: None,
                steps=dict.fromkeys(sorted({row.strategy for row in rows} - {None})),
                distinct=False, records=records, tokens=tokens)
    reserved = re.compile("|".join(SPECIALS) + "|<z[0-9]+>")
    data = zlib.crc32("\n".join(f"{row.x}\t{row.y}" for row in rows).encode())
    return replace(task, vocab=traces.vocabulary(task, rows, reserved), data=data)


# every task by name, as a function of its sizes, and at its default sizes
TASK_FUNCTIONS = {f.__name__: f for f in (list_summation, sorting_algorithms, grid_pathfinding,
                                          linear_equation_solving, base_conversion, multidigit_addition)}
TASKS = {name: task() for name, task in TASK_FUNCTIONS.items()}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may have seen enough
    any_terminal()
    if sys.argv[1:2] in (["--help"], ["-h"]):
        sys.exit(print(__doc__))
    for path in sys.argv[1:]:
        traces.describe(traces_task(path))
    for task in TASKS.values() if len(sys.argv) == 1 else ():
        x = task.sample_input(random.Random(1))
        print(f"\n{task.name}   x = {' '.join(x)}")
        for strategy in task.strategies:
            print(f"  {strategy:24s} {' '.join(task.trace(x, strategy))}")
