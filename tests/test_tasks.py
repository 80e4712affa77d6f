"""The six tasks against textbook solvers written here from scratch, the split, attribution and the tokenizer."""
import dataclasses
import inspect
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter, deque
from fractions import Fraction
from functools import lru_cache

import pytest

import tasks
from conftest import ROOT
from tasks import SPECIALS, TASK_FUNCTIONS, TASKS, Tokenizer

STRATEGIES = {
    "list_summation": ("left-to-right", "right-to-left", "pairwise"),
    "sorting_algorithms": ("bubble-sort", "selection-sort", "insertion-sort", "merge-sort", "heap-sort"),
    "grid_pathfinding": ("right-first", "down-first", "alternating"),
    "linear_equation_solving": ("subtract-then-divide", "divide-then-subtract", "inverse-ops"),
    "base_conversion": ("repeated-division", "via-binary", "decomposition"),
    "multidigit_addition": ("right-to-left-carry", "left-to-right-partials", "rounding-decomposition"),
}
OTHER_SIZES = [("list_summation", (6, 9, 5)), ("sorting_algorithms", (3, 7)), ("sorting_algorithms", (5, 8, 20)),
               ("grid_pathfinding", (8, 3)), ("linear_equation_solving", (20, 30, 99)),
               ("base_conversion", (500, 9999)), ("multidigit_addition", (2, 4))]

every_task = pytest.mark.parametrize("name", STRATEGIES)
every_strategy = pytest.mark.parametrize("name, strategy", [(n, s) for n in STRATEGIES for s in STRATEGIES[n]])


@lru_cache(maxsize=None)
def inputs(name, count=400):
    rng = random.Random(f"inputs of {name}")
    return [TASKS[name].sample_input(rng) for _ in range(count)]


def spell(line):
    """'7+8+0=5 carry 1' -> 7 + 8 + 0 = 5 carry 1: numbers digit by digit, 'carry' as one token."""
    return re.findall(r"carry|\S", line)


# ------------------------------------------------------------------------------------- solvers that share no code
def replay_running_sum(values):
    totals = list(itertools.accumulate(values))
    return [spell(f"{before}+{v}={after}") for before, v, after in zip(totals, values[1:], totals[1:])]


def replay_rounds_of_pairs(values):
    lines, pending = [], deque(values)
    while len(pending) > 1:
        sums = deque()
        while pending:
            total = pending.popleft()
            if pending:
                lines.append(spell(f"{total}+{pending[0]}={total + pending[0]}"))
                total += pending.popleft()
            sums.append(total)
        pending = sums
    return lines


def bubble_sort(a):
    for _ in a:
        for i in range(len(a) - 1):
            if a[i] > a[i + 1]:
                a[i], a[i + 1] = a[i + 1], a[i]
                yield


def selection_sort(a):
    for i in range(len(a)):
        smallest = i
        for j in range(i + 1, len(a)):
            if a[j] < a[smallest]:
                smallest = j
        a[i], a[smallest] = a[smallest], a[i]
        yield


def insertion_sort(a):
    for i in range(1, len(a)):
        value, hole = a[i], i
        while hole > 0 and a[hole - 1] > value:
            a[hole] = a[hole - 1]
            hole -= 1
        a[hole] = value
        yield


def merge_sort(a):
    width = 1
    while width < len(a):
        for start in range(0, len(a), 2 * width):
            left, right = a[start:start + width], a[start + width:start + 2 * width]
            merged = []
            while left and right:
                merged.append((left if left[0] < right[0] else right).pop(0))
            a[start:start + 2 * width] = merged + left + right
            yield
        width *= 2


def is_max_heap(a):
    return all(a[(i - 1) // 2] > a[i] for i in range(1, len(a)))


def heap_sort(a):
    def swap_if_larger(below, above):
        if a[below] > a[above]:
            a[below], a[above] = a[above], a[below]
            yield
            return True

    def rise(child):
        if child and (yield from swap_if_larger(child, (child - 1) // 2)):
            yield from rise((child - 1) // 2)

    def sink(root, size):
        children = sorted((i for i in (2 * root + 1, 2 * root + 2) if i < size), key=a.__getitem__)
        if children and (yield from swap_if_larger(children[-1], root)):
            yield from sink(children[-1], size)

    for size in range(1, len(a) + 1):
        yield from rise(size - 1)
        assert is_max_heap(a[:size]), a
    for size in reversed(range(1, len(a))):
        a[0], a[size] = a[size], a[0]
        yield
        yield from sink(0, size)
        assert is_max_heap(a[:size]), a


def replay_sort(sort, x):
    """Runs an in-place sort and notes the list at every yield at which it has changed."""
    a = [int(t) for t in x]
    seen = [list(a)]
    for _ in sort(a):
        if a != seen[-1]:
            seen.append(list(a))
    return [[str(v) for v in state] for state in seen[1:]]


def replay_walk(wanted, x):
    """Walks cell by cell: the wanted move where it leads towards the goal, else the other one."""
    row, col, row_goal, col_goal = (int(t) for t in x if t != "to")
    steps = []
    while (row, col) != (row_goal, col_goal):
        move = wanted(len(steps))
        if (move == "right" and col == col_goal) or (move == "down" and row == row_goal):
            move = {"right": "down", "down": "right"}[move]
        if move == "right":
            col += 1
        else:
            row += 1
        steps.append([move, str(row), str(col)])
    return steps


def equation(x):
    """(a, b, c, root) of a x + b = c, the root by trying 0, 1, 2, ..."""
    a, b, c = map(int, re.fullmatch(r"(\d+)x\+(\d+)=(\d+)", "".join(x)).groups())
    return a, b, c, next(r for r in range(c + 1) if a * r + b == c)


def replay_equation(forms):
    def replay(x):
        a, b, c, root = equation(x)
        return [spell(form.format(a=a, b=b, c=c, rest=a * root, root=root)) for form in forms]
    return replay


def conversion(x):
    """(n, base, bits per digit, digits of n in that base, read off its zero-padded binary form)."""
    n, base = map(int, "".join(x).split("base"))
    width = {4: 2, 8: 3, 16: 4}[base]
    bits = f"{n:b}"
    bits = "0" * (-len(bits) % width) + bits
    return n, base, width, "".join(f"{int(bits[i:i + width], 2):x}" for i in range(0, len(bits), width))


def replay_division(x):
    n, base, _, digits = conversion(x)
    return [spell(f"{n // base ** i}/{base}={n // base ** (i + 1)}r{digits[-1 - i]}") for i in range(len(digits))]


def replay_binary(x):
    n, _, width, digits = conversion(x)
    return [spell(f"{n}={bin(n)[2:]}")] + [spell(bin(int(d, 16))[2:].zfill(width) + "=" + d) for d in digits]


def replay_powers(x):
    n, base, _, digits = conversion(x)
    rests = [int(digits[i:] or "0", base) for i in range(len(digits) + 1)]
    powers = [base ** i for i in reversed(range(len(digits)))]
    return [spell(f"{rests[i]}={d}*{powers[i]}+{rests[i + 1]}") for i, d in enumerate(digits)]


def addends(x):
    return [int(n) for n in "".join(x).split("+")]


def replay_columns(x):
    lines, carry = [], 0
    for p, q in itertools.zip_longest(*(reversed(str(n)) for n in addends(x)), fillvalue="0"):
        after, digit = divmod(int(p) + int(q) + carry, 10)
        lines.append(spell(f"{p}+{q}+{carry}={digit} carry {after}"))
        carry = after
    return lines


def replay_partial_sums(x):
    width = max(len(str(n)) for n in addends(x))
    a, b = (str(n).zfill(width) for n in addends(x))
    lines = []
    for i in range(width):
        zeros = "0" * (width - 1 - i)
        p, q = int(a[i] + zeros), int(b[i] + zeros)
        so_far = int(a[:i + 1] + zeros) + int(b[:i + 1] + zeros)
        lines.append(spell(f"{p}+{q}={p + q}"))
        if i:
            lines.append(spell(f"{so_far - p - q}+{p + q}={so_far}"))
    return lines


def replay_rounding(x):
    a, b = addends(x)
    tens = math.ceil(Fraction(b, 10)) * 10
    lines = f"{b}+{tens - b}={tens}", f"{a}+{tens}={a + tens}", f"{a + tens}-{tens - b}={a + b}"
    return [spell(line) for line in lines]


REPLAYS = {
    "list_summation": {
        "left-to-right": lambda x: replay_running_sum([int(t) for t in x]),
        "right-to-left": lambda x: replay_running_sum([int(t) for t in x][::-1]),
        "pairwise": lambda x: replay_rounds_of_pairs([int(t) for t in x])},
    "sorting_algorithms": {
        "bubble-sort": lambda x: replay_sort(bubble_sort, x),
        "selection-sort": lambda x: replay_sort(selection_sort, x),
        "insertion-sort": lambda x: replay_sort(insertion_sort, x),
        "merge-sort": lambda x: replay_sort(merge_sort, x),
        "heap-sort": lambda x: replay_sort(heap_sort, x)},
    "grid_pathfinding": {
        "right-first": lambda x: replay_walk(lambda i: "right", x),
        "down-first": lambda x: replay_walk(lambda i: "down", x),
        "alternating": lambda x: replay_walk(lambda i: ("right", "down")[i % 2], x)},
    "linear_equation_solving": {
        "subtract-then-divide": replay_equation(["{a}x={c}-{b}", "{a}x={rest}", "x={rest}/{a}", "x={root}"]),
        "divide-then-subtract": replay_equation(["x+{b}/{a}={c}/{a}", "x={c}/{a}-{b}/{a}", "x={rest}/{a}", "x={root}"]),
        "inverse-ops": replay_equation(["{c}-{b}={rest}", "{rest}/{a}={root}"])},
    "base_conversion": {
        "repeated-division": replay_division, "via-binary": replay_binary, "decomposition": replay_powers},
    "multidigit_addition": {
        "right-to-left-carry": replay_columns, "left-to-right-partials": replay_partial_sums,
        "rounding-decomposition": replay_rounding},
}
ANSWERS = {
    "list_summation": lambda x: list(str(sum(int(t) for t in x))),
    "sorting_algorithms": lambda x: [str(v) for v in range(100) if str(v) in x],
    "grid_pathfinding": lambda x: [str(abs(int(x[0]) - int(x[3])) + abs(int(x[1]) - int(x[4])))],
    "linear_equation_solving": lambda x: list(str(equation(x)[3])),
    "base_conversion": lambda x: list(conversion(x)[3]),
    "multidigit_addition": lambda x: list(str(sum(addends(x)))),
}


def replay(name, strategy, x):
    return list(replay_once(name, strategy, tuple(x)))


@lru_cache(maxsize=None)
def replay_once(name, strategy, x):
    steps = REPLAYS[name][strategy](x)
    return [t for step in steps for t in step + [";"]] + ["ans"] + ANSWERS[name](x)


# ------------------------------------------------------------------------------------------------- traces, answers
def test_the_tasks_and_their_strategies_are_the_documented_ones():
    assert {name: task.strategies for name, task in TASKS.items()} == STRATEGIES


@every_strategy
def test_every_trace_is_reproduced_by_an_independent_solver(name, strategy):
    """Token for token, by a textbook solver that shares no code with tasks.py."""
    for x in inputs(name):
        assert TASKS[name].trace(x, strategy) == replay(name, strategy, x), " ".join(x)


def test_the_independent_conversion_agrees_with_int():
    """int(digits, base) = n: the reference above is itself checked against the standard library."""
    for x in inputs("base_conversion"):
        n, base, _, digits = conversion(x)
        assert int(digits, base) == n and digits[0] != "0", " ".join(x)


@every_task
def test_the_answer_is_true_and_ends_every_trace(name):
    for x in inputs(name):
        assert TASKS[name].answer(x) == ANSWERS[name](x), " ".join(x)
        for strategy in STRATEGIES[name]:
            assert TASKS[name].parse(TASKS[name].trace(x, strategy)).answer == ANSWERS[name](x), (x, strategy)


def test_heap_sort_takes_the_top_of_a_heap_every_time():
    """Position i gets its final value from the top; before that, a[:i + 1] is a max-heap: a[(j - 1) // 2] > a[j]."""
    task = TASKS["sorting_algorithms"]
    for x in inputs(task.name):
        states = [[int(t) for t in state] for state in [x, *task.parse(task.trace(x, "heap-sort")).steps]]
        for i in range(len(x) - 1, 0, -1):
            before, after = [(p, q) for p, q in zip(states, states[1:]) if p[i] != q[i]][-1]
            assert is_max_heap(before[:i + 1]), (x, before)
            assert (after[0], after[i]) == (before[i], before[0]), (x, before, after)


def value(expression, root):
    """'3x+5/2' as an exact fraction, at x = root."""
    return eval(re.sub(r"\d+", r"F(\g<0>)", expression).replace(")x", ")*x"), {"F": Fraction, "x": Fraction(root)})


@pytest.mark.parametrize("name", ["list_summation", "linear_equation_solving", "multidigit_addition"])
def test_every_line_of_a_sum_or_an_equation_is_true(name):
    """Left = right in exact fractions, with the root for x; a column's right side means 10 * carry + digit."""
    task = TASKS[name]
    for x, strategy in itertools.product(inputs(name), STRATEGIES[name]):
        root = equation(x)[3] if name == "linear_equation_solving" else 0
        for step in task.parse(task.trace(x, strategy)).steps:
            left, right = "".join(step).split("=")
            digit, _, carry = right.partition("carry")
            assert value(left, root) == value(digit, root) + 10 * int(carry or 0), (x, strategy, step)


def test_every_line_of_a_base_conversion_is_true():
    """n = base * q + r chained down to q = 0; bit groups that spell n; n = sum of digit * power with smaller rests."""
    task = TASKS["base_conversion"]
    for x in inputs(task.name):
        n, base = map(int, "".join(x).split("base"))
        division, binary, powers = (["".join(s) for s in task.parse(task.trace(x, s)).steps] for s in task.strategies)

        left = n
        for line in division:
            dividend, divisor, quotient, remainder = re.fullmatch(r"(\d+)/(\d+)=(\d+)r(.)", line).groups()
            assert (int(dividend), int(divisor)) == (left, base), line
            assert divmod(left, base) == (int(quotient), int(remainder, 16)), line
            left = int(quotient)
        assert left == 0, division

        (whole, bits), *groups = (line.split("=") for line in binary)
        assert int(whole) == int(bits, 2) == n and "".join(g for g, _ in groups).lstrip("0") == bits, binary
        assert all(2 ** len(g) == base and int(g, 2) == int(d, 16) for g, d in groups), binary

        left = n
        for power, line in zip(reversed(range(len(powers))), powers):
            whole, digit, unit, rest = re.fullmatch(r"(\d+)=(.)\*(\d+)\+(\d+)", line).groups()
            assert int(whole) == left == int(digit, 16) * int(unit) + int(rest), line
            assert int(rest) < int(unit) == base ** power, line
            left = int(rest)
        assert left == 0, powers


def docstring_examples(name):
    """The x of a task's docstring and {strategy: trace}, without the remarks in parentheses."""
    first, *lines = inspect.getdoc(TASK_FUNCTIONS[name]).splitlines()
    x = re.fullmatch(r"x = ([^;(]*?)\s*([;(].*)?", first).group(1)
    examples = dict(re.fullmatch(r"(\S+)\s{2,}(.*?)(?:\s{2,}\(.*\))?", line).groups() for line in lines)
    return x.split(), {strategy: y.split() for strategy, y in examples.items()}


@every_task
def test_the_docstring_shows_one_true_example_of_every_strategy(name):
    """Each line of the docstring is what trace() gives and what the independent solver gives."""
    x, examples = docstring_examples(name)
    assert TASKS[name].check(x) is None and TASKS[name].is_valid_input(x)
    assert tuple(examples) == STRATEGIES[name]
    for strategy, y in examples.items():
        assert y == TASKS[name].trace(x, strategy) == replay(name, strategy, x), strategy


def test_the_command_prints_one_trace_of_every_strategy():
    done = subprocess.run([sys.executable, "tasks.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = [line.split() for line in done.stdout.splitlines() if line.strip()]
    for name, strategies in STRATEGIES.items():
        (_, _, _, *x), *traces = shown[:1 + len(strategies)]
        shown = shown[1 + len(strategies):]
        assert traces == [[s, *TASKS[name].trace(x, s)] for s in strategies]
    assert not shown


# ----------------------------------------------------------------------------------------------- parse, attribution
@every_task
def test_parse_gives_the_steps_back(name):
    for x, strategy in itertools.product(inputs(name), STRATEGIES[name]):
        steps, answer, reason = TASKS[name].parse(TASKS[name].trace(x, strategy))
        assert (steps, answer, reason) == (REPLAYS[name][strategy](x), ANSWERS[name](x), None), (x, strategy)


@every_task
def test_parse_says_why_a_malformed_solution_has_no_steps(name):
    y = TASKS[name].trace(inputs(name)[0], STRATEGIES[name][0])
    cut = y.index("ans")
    body, ending = y[:cut], y[cut:]
    malformed = {"empty": [], "no ans": body + ending[1:], "no last ;": body[:-1] + ending,
                 "only ;": [";"] + ending, "empty first step": [";"] + body + ending,
                 "empty last step": body + [";"] + ending, "empty middle step": body + [";"] + body + ending,
                 "no answer": body + ["ans"], "two answers": y + ending, "; in the answer": y + [";"],
                 "a special token in the answer": y + ["</y>"], "an unknown token in the answer": y + ["?"]}
    for case, broken in malformed.items():
        steps, answer, reason = TASKS[name].parse(broken)
        assert steps is None and answer is None and reason, case


def test_a_trace_may_have_no_steps():
    """Merge sort has nothing to do to some lists that are sorted already."""
    task = dataclasses.replace(TASKS["sorting_algorithms"], distinct=False)
    x = list("0479")
    y = task.trace(x, "merge-sort")
    assert y == ["ans", *x] and task.parse(y) == ([], x, None) and "merge-sort" in task.all_strategies(x, y)


@every_task
def test_parse_loses_no_token_of_garbage(name):
    """Random tokens never raise: they give a reason, or steps and an answer that spell the input again."""
    rng, task, parsed = random.Random(5), TASKS[name], 0
    for _ in range(2000):
        y = rng.choices([*task.vocab, *[";", "ans"] * len(task.vocab)], k=rng.randint(0, 8))
        steps, answer, reason = task.parse(y)
        if reason is None:
            assert [t for step in steps for t in [*step, ";"]] + ["ans", *answer] == y
            assert all(steps) and answer
            parsed += 1
        else:
            assert isinstance(reason, str) and reason and steps is None and answer is None
    assert parsed


@every_task
def test_every_trace_is_attributed_to_its_own_strategy(name):
    for x, strategy in itertools.product(inputs(name), STRATEGIES[name]):
        y = TASKS[name].trace(x, strategy)
        assert TASKS[name].attribute(x, y) == TASKS[name].attribute(x, tuple(y)) == strategy, x


def edited(rng, y, vocab):
    """y with one token dropped, added or replaced by another one."""
    i, kind = rng.randrange(len(y)), rng.choice(["drop", "add", "replace"])
    if kind == "drop":
        return y[:i] + y[i + 1:]
    if kind == "add":
        return y[:i] + [rng.choice(vocab)] + y[i:]
    return y[:i] + [rng.choice([t for t in vocab if t != y[i]])] + y[i + 1:]


@every_task
def test_one_wrong_token_leaves_a_trace_unattributed(name):
    """Traces of one input are more than one edit apart, so an edit of one never hits another."""
    rng, task = random.Random(4), TASKS[name]
    for x, strategy in itertools.product(inputs(name), STRATEGIES[name]):
        y = edited(rng, task.trace(x, strategy), task.vocab)
        assert y not in [replay(name, s, x) for s in STRATEGIES[name]], (x, strategy, y)
        assert task.attribute(x, y) is None, (x, strategy, y)


@every_task
def test_the_nearest_strategy_of_a_beginning_can_continue_it(name):
    """A trace cut anywhere is nearest to a strategy whose trace begins so, and to its own once that is the only one."""
    task = TASKS[name]
    for x, strategy in itertools.product(inputs(name)[:25], STRATEGIES[name]):
        traces = {s: replay(name, s, x) for s in STRATEGIES[name]}
        for cut in range(len(traces[strategy]) + 1):
            beginning = traces[strategy][:cut]
            candidates = [s for s in traces if traces[s][:cut] == beginning]
            assert task.nearest_strategy(x, beginning) == candidates[0], (x, strategy, cut)


@every_task
def test_the_nearest_strategy_shares_the_longest_prefix(name):
    rng, task = random.Random(6), TASKS[name]
    for x, strategy in itertools.product(inputs(name), STRATEGIES[name]):
        y = edited(rng, replay(name, strategy, x), task.vocab)
        shared = {s: len(os.path.commonprefix([replay(name, s, x), y])) for s in STRATEGIES[name]}
        assert shared[task.nearest_strategy(x, y)] == max(shared.values()), (x, strategy, y)


# ------------------------------------------------------------------------------------------------ inputs, the split
SPLITS = {"train": 0.85, "validation": 0.05, "test": 0.1}


@every_task
def test_no_validation_or_test_input_is_trained_on(name):
    """8,500 training, 300 validation and 300 test inputs a task share no input; each is on its side."""
    task, rng = TASKS[name], random.Random(2)
    drawn = {split: {tuple(task.sample_input(rng, split)) for _ in range(8500 if split == "train" else 300)}
             for split in SPLITS}
    assert all(not drawn[a] & drawn[b] for a, b in itertools.combinations(SPLITS, 2))
    assert all({task.split(x) for x in drawn[split]} == {split} for split in SPLITS)


@every_task
def test_the_split_has_its_shares_of_the_inputs(name):
    """The hash as a die for each of n different inputs: every share within 5 sqrt(p (1 - p) / n) of its p. A draw of no
    particular split takes from all of them."""
    distinct = {tuple(x) for x in inputs(name, 2000)}
    found = [TASKS[name].split(x) for x in distinct]
    assert set(found) == set(SPLITS)
    for split, p in SPLITS.items():
        share = found.count(split) / len(found)
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / len(found)), (split, share, len(found))


def test_the_split_depends_on_neither_order_nor_process():
    """The same verdicts backwards, on fresh tasks, and in processes in which Python hashes strings otherwise."""
    asked = [(name, x) for name in STRATEGIES for x in inputs(name)]
    verdicts = [TASKS[name].split(x) for name, x in asked]
    fresh = {name: task() for name, task in TASK_FUNCTIONS.items()}
    assert [fresh[name].split(tuple(x)) for name, x in reversed(asked)] == verdicts[::-1]
    program = ("import json, sys, tasks; "
               "print(json.dumps([tasks.TASKS[name].split(x) for name, x in json.load(sys.stdin)]))")
    for hash_seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", program], input=json.dumps(asked), capture_output=True, text=True,
                              cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True)
        assert json.loads(done.stdout) == verdicts


def test_the_split_of_an_input_is_the_same_for_ever():
    """Checkpoints were trained on one side of it: CRC-32 of the input's text modulo 20, by a table-free loop."""
    def crc32(text):
        crc = 0xFFFFFFFF
        for byte in text.encode():
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    sides = {0: "test", 10: "test", 1: "validation"}
    for name in STRATEGIES:
        for x in inputs(name):
            assert TASKS[name].split(x) == sides.get(crc32(" ".join(x)) % 20, "train"), x


@every_task
@pytest.mark.parametrize("split", [None, *SPLITS])
def test_sampling_is_a_function_of_the_seed(name, split):
    """Equal seeds, equal inputs, whatever is drawn in between; the global generator is neither used nor moved."""
    def draw(seed, disturb=False):
        rng, drawn = random.Random(seed), []
        for i in range(50):
            drawn.append(TASKS[name].sample_input(rng, split))
            if disturb:
                TASKS[name].sample_input(random.Random(i))
        return drawn

    before = random.getstate()
    assert draw(7) == draw(7, disturb=True) != draw(8)
    assert random.getstate() == before


def test_lists_to_sort_are_of_every_length_equally_often():
    """Although strategies coincide on many lists of 4, which are no inputs: 3,000 draws, 5 standard errors."""
    rng = random.Random(0)
    lengths = [len(TASKS["sorting_algorithms"].sample_input(rng)) for _ in range(3000)]
    assert all(abs(lengths.count(n) / 3000 - 1 / 3) < 0.043 for n in (4, 5, 6))


@every_task
def test_strategies_differ_on_every_sampled_input(name):
    for x in inputs(name):
        traces = [replay(name, s, x) for s in STRATEGIES[name]]
        assert all(p != q for p, q in itertools.combinations(traces, 2)), " ".join(x)
        assert TASKS[name].is_valid_input(x)


@pytest.mark.parametrize("name, text", [
    ("list_summation", "3 5 5 3"), ("sorting_algorithms", "1 2 3 4"), ("sorting_algorithms", "2 1 3 4"),
    ("grid_pathfinding", "3 4 to 4 5"), ("grid_pathfinding", "3 4 to 3 6")])
def test_an_input_on_which_strategies_coincide_is_never_sampled(name, text):
    """A palindrome read from both ends, a list (nearly) in order, a path with one way to go: two traces are equal."""
    task, x = TASKS[name], text.split()
    assert len({tuple(replay(name, s, x)) for s in STRATEGIES[name]}) < len(STRATEGIES[name])
    assert not task.is_valid_input(x)
    drawn = iter([x, inputs(name)[0]])
    stubborn = tasks.Task(name, task.vocab, lambda rng: next(drawn), task.check, task.answer, task.steps)
    assert stubborn.sample_input(random.Random(0)) == inputs(name)[0]


def test_inputs_are_found_that_few_draws_give():
    """On a large grid with small distances, one draw in two thousand is a test input."""
    task, rng = TASK_FUNCTIONS["grid_pathfinding"](max_distance=2), random.Random(0)
    for _ in range(20):
        assert task.split(task.sample_input(rng, "test")) == "test"


def test_sizes_without_an_input_of_a_split_are_named_with_it():
    """A grid of two cells has one way to go, on which strategies coincide; one of three has a few inputs."""
    with pytest.raises(ValueError, match="grid_pathfinding of these sizes has no test input"):
        TASK_FUNCTIONS["grid_pathfinding"](2, 1).sample_input(random.Random(0), "test")


@every_task
def test_check_accepts_what_is_sampled(name):
    assert all(TASKS[name].check(x) is None for x in inputs(name))


MALFORMED = {
    "list_summation": ["", "3", "3 5 2", "3 5 2 7 1 4", "3 0 2 7", "3 + 5 2", "3 5 2 ;", "ans 5 2 7"],
    "sorting_algorithms": ["", "4", "4 2 3", "4 2 3 4", "9 8 7 6 5 4 3", "4 2 ; 1", "ans 2 3 1"],
    "grid_pathfinding": [
        "", "to", "3 4 5 6", "3 4 to 5", "3 4 to 5 6 7", "3 to 4 5 6", "5 6 to 3 4", "3 6 to 5 4", "3 4 to 9 5",
        "3 4 to 4 10", "3 16 to 4 17", "right 4 to 5 6", "to to to to to", "3 4 ; 5 6"],
    "linear_equation_solving": [
        "", "x", "x + =", "3 x + 5", "3 x = 2 0", "3 x + 5 = 2 1", "x + 5 = 2 0", "1 x + 5 = 2 0", "3 x + 0 = 1 5",
        "3 x + 5 = 5", "3 x - 5 = 2 0", "0 3 x + 5 = 2 0", "3 x + 5 = 2 0 = 2 0", "3 x x + 5 = 2 0", "3 + 5 x = 2 0",
        "3 x + 3 5 = 5 0", "= 2 0 3 x + 5", "3 = 5 x + 2 0"],
    "base_conversion": [
        "", "base", "base 1 6", "1 8 2 base", "1 8 2", "1 8 2 base 1 0", "1 8 2 base 2", "1 5 base 8", "5 1 2 base 8",
        "b 6 base 1 6", "0 1 8 2 base 8", "1 8 2 base base 8", "1 8 2 base 8 base 8", "1 8 2 / 8", "1 8 2 base 0 8"],
    "multidigit_addition": [
        "", "+", "4 7", "4 7 +", "+ 3 8", "4 7 + 3 8 + 1", "4 7 - 3 8", "4 + 3", "1 0 0 + 3", "0 4 + 3", "4 7 + + 3 8",
        "4 7 = 3 8", "4 7 + 3 8 ;", "0 + 1 2", "1 2 + 0"],
}


@pytest.mark.parametrize("name, text", [(name, text) for name in MALFORMED for text in MALFORMED[name]])
def test_check_says_what_is_wrong_with_a_malformed_input(name, text):
    reason = TASKS[name].check(text.split())
    assert isinstance(reason, str) and reason


@every_task
def test_what_check_accepts_every_strategy_can_solve(name):
    """No random, edited or reordered input makes check raise; what it accepts is solved as the replay solves it."""
    rng, task = random.Random(3), TASKS[name]
    candidates = [list(x) for x in itertools.permutations(docstring_examples(name)[0])]
    for x in inputs(name, 1000):
        once = edited(rng, x, task.vocab)
        candidates += [rng.choices(task.vocab, k=rng.randint(0, 9)), once, edited(rng, once, task.vocab)]
    candidates.append([token for t in x for token in (5000 * [t] if t in tasks.DIGITS else [t])])  # too long for int()
    reasons = [task.check(x) for x in candidates]
    assert all(reason is None or isinstance(reason, str) and reason for reason in reasons)
    accepted = [x for x, reason in zip(candidates, reasons) if reason is None]
    assert 0 < len(accepted) < len(candidates)
    for x, strategy in itertools.product(accepted, STRATEGIES[name]):
        assert task.trace(x, strategy) == replay(name, strategy, x), " ".join(x)


@pytest.mark.parametrize("name, sizes", OTHER_SIZES)
def test_sizes_are_parameters(name, sizes):
    """A task of another size samples, solves, encodes and attributes as the default one does."""
    task, rng = TASK_FUNCTIONS[name](*sizes), random.Random(1)
    tokenizer = Tokenizer(task.vocab)
    for _ in range(100):
        x = task.sample_input(rng)
        assert task.check(x) is None, " ".join(x)
        for strategy in STRATEGIES[name]:
            y = task.trace(x, strategy)
            assert y == replay(name, strategy, x), (x, strategy)
            assert task.attribute(x, y) == strategy, (x, strategy)
            assert tokenizer.decode(tokenizer.encode(y)) == y


# ----------------------------------------------------------------------------- kinds of input, wordings, coincidences
KINDS = {
    "list_summation": {"3 5 2 7": "4 numbers", "3 5 2 7 1": "5 numbers"},
    "sorting_algorithms": {"4 2 3 1": "4 numbers", "2 6 1 3 5": "5 numbers", "6 1 2 5 4 3": "6 numbers"},
    "grid_pathfinding": {"3 4 to 5 7": "wide", "3 4 to 5 6": "tall or square", "3 4 to 6 6": "tall or square"},
    "linear_equation_solving": {"5 x + 5 = 2 0": "small factor", "6 x + 2 = 2 0": "large factor"},
    "base_conversion": {"1 8 2 base 1 6": "base 16", "1 8 2 base 8": "base 8", "4 4 base 4": "base 4"},
    "multidigit_addition": {"4 7 + 3 8": "first larger", "3 8 + 3 8": "second larger or equal",
                            "9 + 3 8": "second larger or equal"},
}


@every_task
def test_an_input_is_of_one_of_two_or_more_kinds_each_of_which_is_often_drawn(name):
    assert all(TASKS[name].kind(x.split()) == kind for x, kind in KINDS[name].items())
    found = [TASKS[name].kind(x) for x in inputs(name)]
    assert set(found) == set(KINDS[name].values()) and len(set(found)) > 1
    assert all(found.count(kind) > 0.2 * len(found) for kind in set(found))


def test_the_mixture_has_the_shares_of_its_weights_and_no_strategy_without_one():
    """Equal ones where there are no weights; a row's own where there is a row for every kind of input."""
    first, second, third = STRATEGIES["grid_pathfinding"]
    wide, square = "3 4 to 5 7".split(), "3 4 to 5 6".split()
    for weights, x, want in ((None, wide, {first: 1 / 3, second: 1 / 3, third: 1 / 3}),
                             ([0, 3, 1], wide, {second: 3 / 4, third: 1 / 4}),
                             ({"wide": [1, 1, 2], "tall or square": [0, 0, 5]}, wide,
                              {first: 1 / 4, second: 1 / 4, third: 1 / 2}),
                             ({"wide": [1, 1, 2], "tall or square": [0, 0, 5]}, square, {third: 1.0})):
        task = dataclasses.replace(TASKS["grid_pathfinding"], weights=weights)
        assert task.mixture(x) == pytest.approx(want)
        assert task.traces(x) == [(s, replay(task.name, s, x)) for s in want]


def test_a_strategy_that_the_data_lacks_is_not_recognised_and_makes_no_input_invalid():
    """On two numbers there is nothing to pair: the sum from the left is the pairwise one."""
    task = TASK_FUNCTIONS["list_summation"](2, 4)
    x, longer = ["3", "5"], "3 5 2 7".split()
    pairwise = task.trace(longer, "pairwise")
    assert not task.is_valid_input(x) and task.attribute(longer, pairwise) == "pairwise"
    lacking = dataclasses.replace(task, weights={f"{n} numbers": [1, 1, 0] for n in (2, 3, 4)})
    assert lacking.is_valid_input(x) and lacking.attribute(longer, pairwise) is None
    assert lacking.all_strategies(x, lacking.trace(x, "pairwise")) == ["left-to-right"]
    assert lacking.nearest_strategy(longer, pairwise) != "pairwise"
    assert not dataclasses.replace(lacking, commute=True).is_valid_input(x)  # 3 + 5 is 5 + 3


def worded(task, separators=True, commute=True):
    """The task with wordings, as train_base.make_task makes it."""
    if separators:
        task = dataclasses.replace(task, separators=(";", ","), vocab=(*task.vocab, ","))
    return dataclasses.replace(task, commute=commute)


def wordings(y, separators=True, commute=True):
    """All ways to write y, as strings without blanks: each step ends in ; or , and is written both ways if it is
    'a + b = c'."""
    *steps, answer = "".join(y).split(";")
    ways = []
    for step in steps:
        match = re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step)
        forms = {step, "{1}+{0}={2}".format(*match.groups())} if match and commute else {step}
        ways.append([form + end for form in forms for end in (";," if separators else ";")])
    return {"".join(way) + answer for way in itertools.product(*ways)}


@pytest.mark.parametrize("separators, commute, n", [(True, True, 32), (True, False, 8), (False, True, 4)])
def test_every_wording_is_equally_likely(separators, commute, n):
    """1 + 2, then 3 + 3, which has one order, then 6 + 4: of 200 n draws each is drawn 200 times, within 5
    standard deviations, and the nats are log n."""
    task, rng = worded(TASKS["list_summation"], separators, commute), random.Random(0)
    y = task.trace("1 2 3 4".split(), "left-to-right")
    drawn = [task.word(y, rng) for _ in range(200 * n)]
    counts = Counter("".join(worded) for worded, _ in drawn)
    assert set(counts) == wordings(y, separators, commute) and len(counts) == n
    assert all(abs(count - 200) < 5 * 200 ** 0.5 for count in counts.values())
    assert all(nats == pytest.approx(math.log(n)) for _, nats in drawn)


@every_task
def test_a_wording_is_read_as_what_it_words(name):
    """On inputs on which no two strategies have a wording in common."""
    task, rng = worded(TASKS[name]), random.Random(1)
    for x in [task.sample_input(rng) for _ in range(40)]:
        traces = {s: task.trace(x, s) for s in task.strategies}
        assert all(wordings(traces[s]).isdisjoint(wordings(traces[r]))
                   for s, r in itertools.combinations(traces, 2)), x
        for strategy, y in traces.items():
            assert "".join(y) in wordings(replay(name, strategy, x)) and task.canonical(y) == y
            for _ in range(4):
                other, nats = task.word(y, rng)
                assert nats == pytest.approx(math.log(len(wordings(y))))
                assert "".join(other) in wordings(y) and task.canonical(other) == y
                assert task.attribute(x, other) == strategy == task.nearest_strategy(x, other)
                assert task.all_strategies(x, other) == [strategy]
                assert task.parse(other) == task.parse(y) and task.parse(other).answer == ANSWERS[name](x)


@every_task
def test_without_wordings_nothing_is_drawn_and_nothing_is_changed(name):
    task, rng = TASKS[name], random.Random(1)
    before = rng.getstate()
    for x, strategy in itertools.product(inputs(name)[:50], STRATEGIES[name]):
        y = task.trace(x, strategy)
        assert task.word(y, rng) == (y, 0) and task.canonical(y) == y
    assert rng.getstate() == before


@pytest.mark.parametrize("step, want", [
    ("1 0 + 7 = 1 7", "7 + 1 0 = 1 7"), ("1 0 + 9 = 1 9", "9 + 1 0 = 1 9"), ("9 + 1 0 = 1 9", None),
    ("0 + 0 = 0", None), ("8 + 7 + 0 = 5 carry 1", None), ("x + 5 / 3 = 2 0 / 3", None),
    ("3 x + 2 = 2 0", None), ("9 = 2 * 4 + 1", None), ("9 - 2 = 7", None), ("8 + 7", None), ("8 + = 7", None),
    ("+ 7 = 7", None), ("8 + 0 7 = 1 5", None), ("8 + 7 = 1 4 + 1", None), ("8 + 7 = 1 5 = 1 5", None),
    ("= 8 + 7", None)])
def test_only_the_two_addends_of_a_plain_sum_change_places(step, want):
    """The smaller one is first, as a number; both orders have the same canonical form, and the answer stays."""
    task, step, want = worded(TASKS["multidigit_addition"]), step.split(), (want or step).split()
    assert task.canonical([*step, ",", *step, ";", "ans", "8", "5"]) == [*want, ";", *want, ";", "ans", "8", "5"]
    other = tasks.swapped(step)
    assert tasks.swapped(other) == step and tasks.addends(other) == tasks.addends(step)[::-1]
    assert task.canonical([*other, ";"]) == [*want, ";"] and (want == step or other == want)


@pytest.mark.parametrize("name, text, alike", [
    ("list_summation", "3 5 5 3", ["left-to-right", "right-to-left"]),
    ("sorting_algorithms", "2 1 3 4", ["bubble-sort", "selection-sort", "insertion-sort", "merge-sort"]),
    ("grid_pathfinding", "3 4 to 4 5", ["right-first", "alternating"]),
    ("grid_pathfinding", "3 4 to 3 6", ["right-first", "down-first", "alternating"])])
def test_all_strategies_of_a_trace_are_named_where_coincidence_is_no_matter(name, text, alike):
    task, x = dataclasses.replace(TASKS[name], distinct=False), text.split()
    assert task.is_valid_input(x) and not TASKS[name].is_valid_input(x)
    for strategy in STRATEGIES[name]:
        y = replay(name, strategy, x)
        found = alike if strategy in alike else [strategy]
        assert task.all_strategies(x, y) == found and task.attribute(x, y) == found[0]
    assert task.all_strategies(x, ["ans"]) == []


@pytest.mark.parametrize("name", ["list_summation", "sorting_algorithms", "grid_pathfinding"])
def test_inputs_on_which_strategies_coincide_are_drawn_if_they_are_not_left_out(name):
    """Lists of four to sort as often as among all orders of four numbers: 5 standard deviations."""
    task, rng = dataclasses.replace(TASKS[name], distinct=False), random.Random(0)
    xs = [task.sample_input(rng, "train") for _ in range(1000)]
    assert all(task.check(x) is None and task.split(x) == "train" for x in xs)
    assert 10 < sum(not TASKS[name].is_valid_input(x) for x in xs) < 990
    if name == "sorting_algorithms":
        orders = [[str(v) for v in order] for order in itertools.permutations(range(4))]
        share = sum(map(TASKS[name].is_valid_input, orders)) / 24
        found = [TASKS[name].is_valid_input(x) for x in xs if len(x) == 4]
        assert abs(sum(found) / len(found) - share) < 5 * math.sqrt(share * (1 - share) / len(found))


# ----------------------------------------------------------------------------------------------------- the tokenizer
@every_task
def test_decoding_undoes_encoding(name):
    """decode(encode(t)) = t for every input and trace: each token has its own id, below len(tokenizer)."""
    tokenizer = Tokenizer(TASKS[name].vocab, n_latents=3)
    assert tokenizer.encode(tokenizer.tokens) == list(range(len(tokenizer)))
    assert len(tokenizer) == len(SPECIALS) + len(TASKS[name].vocab) + 3
    for x in inputs(name):
        for tokens in (x, *(TASKS[name].trace(x, s) for s in STRATEGIES[name])):
            assert tokenizer.decode(tokenizer.encode(tokens)) == tokens


def test_special_tokens_come_first_in_their_documented_order():
    order = "<pad> <bos> <eos> <x> </x> <z> </z> <y> </y> <z_empty>".split()
    names = "PAD BOS EOS X X_END Z Z_END Y Y_END Z_EMPTY".split()
    assert list(SPECIALS) == order
    assert [getattr(tasks, n) for n in names] == list(range(10)) == Tokenizer("+").encode(order)


@every_task
def test_latents_are_appended_and_move_no_id(name):
    base, factorized = Tokenizer(TASKS[name].vocab), Tokenizer(TASKS[name].vocab, n_latents=5)
    assert factorized.tokens[:len(base)] == base.tokens
    assert factorized.encode(base.tokens) == base.encode(base.tokens)
    assert factorized.tokens[len(base):] == ("<z1>", "<z2>", "<z3>", "<z4>", "<z5>")
    assert factorized.first_latent == factorized.ids["<z1>"] == len(base)


def test_a_vocabulary_with_a_duplicate_is_refused():
    with pytest.raises(AssertionError, match="duplicate"):
        Tokenizer(("1", "2", "1"))


@pytest.mark.parametrize("name, text, tokens", [
    ("multidigit_addition", "47 + 38", "4 7 + 3 8"), ("multidigit_addition", "47+38", "4 7 + 3 8"),
    ("multidigit_addition", "  4 7+ 38 ", "4 7 + 3 8"), ("multidigit_addition", "carry 1", "carry 1"),
    ("multidigit_addition", "", ""), ("grid_pathfinding", "3 12 to 5 15", "3 12 to 5 15"),
    ("grid_pathfinding", "right 3 12", "right 3 12"), ("grid_pathfinding", "right12", "right 12"),
    ("grid_pathfinding", "27", "2 7"), ("linear_equation_solving", "3x+5=20", "3 x + 5 = 2 0"),
    ("base_conversion", "182 base 16", "1 8 2 base 1 6"), ("base_conversion", "ba", "b a")])
def test_typed_text_splits_into_the_longest_tokens(name, text, tokens):
    assert Tokenizer(TASKS[name].vocab, n_latents=2).split(text) == tokens.split()


@pytest.mark.parametrize("text, piece", [("47 $ 38", "'$'"), ("hello", "'hello'"), ("4 7 + right", "'right'"),
                                         ("47?", "'?'"), ("<z1>", "'<z1>'"), ("<pad>", "'<pad>'")])
def test_an_unknown_piece_of_typed_text_is_named(text, piece):
    """Special and latent tokens cannot be typed either."""
    with pytest.raises(ValueError, match=re.escape(piece)):
        Tokenizer(TASKS["multidigit_addition"].vocab, n_latents=2).split(text)


@every_task
def test_prompts_and_records_have_the_documented_form(name):
    tokenizer, x = Tokenizer(TASKS[name].vocab, n_latents=4), inputs(name)[0]
    y, text = TASKS[name].trace(x, STRATEGIES[name][-1]), " ".join(x)
    for ids, expected in [(tokenizer.prompt(x), f"<bos> <x> {text} </x> <y>"),
                          (tokenizer.prompt(x, 0), f"<bos> <x> {text} </x> <z> <z1> </z> <y>"),
                          (tokenizer.prompt(x, 3), f"<bos> <x> {text} </x> <z> <z4> </z> <y>"),
                          (tokenizer.prompt(x, continuous=True), f"<bos> <x> {text} </x> <z> <z_empty> </z> <y>"),
                          (tokenizer.record(x, y), f"<bos> <x> {text} </x> <y> {' '.join(y)} </y> <eos>")]:
        assert " ".join(tokenizer.decode(ids)) == expected
