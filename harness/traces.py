"""Reads a file of traces: JSON lines such as {"x": "4 2 7", "y": "2 4 7 ; ans 2 4 7"}.

Optional keys: "strategy", a name that evaluate.py alone reads, and "answer". Tokens stand between spaces; if the first
line is {"tokens": "chars"}, every character is one. Several y for one x are expected. A path in .gz is unpacked.
"""
import gzip
import json
import zlib
from typing import NamedTuple

from harness.config import fail


class Record(NamedTuple):
    line: int
    x: str  # tokens, with a space between any two unless characters are tokens
    y: str
    strategy: str | None
    answer: str | None


def read(path):
    """Path -> (list of Record, whether characters are tokens). Ends the program with one line, which names the file and
    the number of its line, where a line is no record."""
    records, chars, n = [], False, 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for n, line in enumerate(f, 1):
                if not line.strip():
                    continue
                entry = json.loads(line)
                if n == 1 and isinstance(entry, dict) and "tokens" in entry:
                    chars = entry == {"tokens": "chars"}
                    if not chars and entry != {"tokens": "spaces"}:
                        fail(f"{path}, line 1: 'tokens' is \"chars\" or \"spaces\", with nothing beside it")
                    continue
                if problem := problem_of(entry):
                    fail(f"{path}, line {n}: {problem}")
                x, y, strategy, answer = map(entry.get, Record._fields[1:])
                if not chars:
                    x, y, answer = (text and " ".join(text.split()) for text in (x, y, answer))
                records.append(Record(n, x, y, strategy, answer))
    except json.JSONDecodeError as e:
        fail(f"{path}, line {n}: not JSON ({e.msg}, column {e.colno})")
    except UnicodeDecodeError:
        fail(f"{path}, line {n + 1} or after it: not UTF-8")
    except (RecursionError, ValueError):
        fail(f"{path}, line {n}: not JSON (nested too deeply, or a number of too many digits)")
    except (OSError, EOFError, zlib.error) as e:
        fail(f"cannot read traces from '{path}': {e}")
    return records, chars


def problem_of(entry):
    """Why a line's content is no record, or None."""
    if not isinstance(entry, dict):
        return "a record is an object such as {\"x\": \"1 2\", \"y\": \"2 1\"}"
    if unknown := set(entry) - set(Record._fields[1:]):
        return f"unknown key {min(unknown)!r}; known: {', '.join(Record._fields[1:])}, and tokens in line 1"
    for key in Record._fields[1:]:
        value = entry.get(key)
        if value is None and key in ("x", "y"):
            return f"'{key}' is missing"
        if value is not None and not (isinstance(value, str) and value.strip()):
            return f"'{key}' is a text that is not empty, got {str(value)[:40]!r}"
        if value and not value.isprintable():
            return f"'{key}' has characters that cannot be printed: {value[:40]!r}"
    return None


def vocabulary(task, rows, reserved):
    """The different tokens of training inputs and their records, sorted. task: the tasks.Task of a file, without its
    vocabulary; rows: list of its Record; reserved: a pattern of tokens that are no file's. Ends the program with one
    line on such a token, on one that training inputs lack, and on a split without inputs."""
    of_split, known = {"train": [], "validation": [], "test": []}, set()
    for row in rows:
        of_split[task.split(task.tokens(row.x))].append(row)
    for name, own in of_split.items():
        if not own:
            fail(f"{task.name}: it has no {name} inputs; of its {len(task.records)} different x, 85% are for training, "
                 "5% for validation, 10% for tests")
        if 10_000 * len(own) < len(rows):
            fail(f"{task.name}: only {len(own)} of {len(rows)} records have {name} inputs: it needs more different x")
        for row in own:
            for token in {*task.tokens(row.x), *task.tokens(row.y), *task.tokens(row.answer or "")} - known:
                if reserved.fullmatch(token):
                    fail(f"{task.name}, line {row.line}: the token {token} is reserved")
                if name != "train":
                    fail(f"{task.name}, line {row.line}: no record of a training input has the token '{token}', but "
                         f"that of a {name} input")
                known.add(token)
    return tuple(sorted(known))


def describe(task):
    """Prints what the file of a task holds."""
    rows = [row for own in task.records.values() for row in own]
    labels, splits = [row.strategy or "no label" for row in rows], [task.split(task.tokens(x)) for x in task.records]
    lengths = [len(task.tokens(row.x)) + len(task.tokens(row.y)) + 6 for row in rows]  # <bos> <x> </x> <y> </y> <eos>
    different = [len({row.y for row in own}) for own in task.records.values()]
    print(f"{len(rows)} records of {len(different)} different x:",
          ", ".join(f"{splits.count(each)} for {each}" for each in ("train", "validation", "test")))
    print(f"different y for one x: {min(different)} to {max(different)}, {sum(different) / len(different):.1f} on "
          "average")
    print(f"tokens of a record, special ones included: {min(lengths)} to {max(lengths)}, "
          f"{sum(lengths) / len(rows):.0f} on average; block_size is at least the largest")
    print(f"{len(task.vocab)} different tokens:", *task.vocab[:60], "..." * (len(task.vocab) > 60))
    print("strategies:", ", ".join(f"{s} ({labels.count(s)})" for s in sorted(set(labels))))
    for row in rows[:3]:
        print(f"line {row.line}: x = {row.x}\n    y = {row.y}")
