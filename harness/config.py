"""Reads a config: a dataclass's defaults, then a Python file of plain assignments, then --key=value flags.

The dataclass is the schema. The type of a field says which values it takes: int and float are at least 0, `Count` at
least 1, `at_least(2)` and `between(0.1, 0.9)` say their limits, `Weight` takes any sign, a Literal what it lists.
"""
import ast
import dataclasses
import difflib
import inspect
import os
import re
import sys
import types
from typing import Annotated, Literal, get_args, get_origin

LARGEST = 1e12  # beyond it, nothing that a key means is left


def between(least, most, kind=float):
    return Annotated[kind, least, most]


def at_least(least, kind=int):
    return between(least, LARGEST, kind)


Count = at_least(1)
Weight = between(-LARGEST, LARGEST)


def fail(message):
    """Ends the program with one line on stderr and exit code 1: for mistakes of the user, not of the programmer."""
    sys.exit("error: " + " ".join(message.split()))


def say(line):
    """Prints a line at once, above a progress bar. A run goes on where nobody reads it any more, or a disk is full."""
    from tqdm import tqdm  # here, because tasks.py needs none
    any_terminal()
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:
        drop_stdout()


def any_terminal():
    """Closed streams go nowhere and become no files of the run; characters a terminal lacks are printed as codes."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_stdout():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_value(key, value, kind):
    """Returns value as `kind`, the type of a field; only an int widens to float. Numbers, also those in a list, are
    finite and within the limits of the type."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            fail(f"config key '{key}' is {' or '.join(map(repr, get_args(kind)))}, got {value!r}")
        return value
    kind, least, most = get_args(kind) if get_origin(kind) is Annotated else (kind, 0, LARGEST)
    kinds = get_args(kind) or (kind,)  # of a union, each
    if float in kinds and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if type(value) not in kinds:
        fail(f"config key '{key}' takes {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
    for number in value if type(value) is list else [value]:
        if type(number) in (int, float) and not least <= number <= most:
            limit = f"at most {most:g}" if number > most else f"at least {least:g}"
            fail(f"config key '{key}' must be {limit}, got {value!r}")
    return value


def usage(script):
    """The docstring of a script and the fields of its Config with their comments: the --help text."""
    fields = "\n".join(inspect.getsource(script.Config).splitlines()[2:])
    return f"{script.__doc__}\nconfig keys, with their defaults:\n{fields}"


def assignments(path):
    """What a config file assigns, key -> value, without what it imports or defines, and names with a leading _."""
    if not os.path.exists(path) or os.path.isdir(path):  # a pipe is no file, but can be read
        folder = os.path.dirname(path) or "."
        there = [os.path.join(folder, name) for name in os.listdir(folder)] if os.access(folder, os.R_OK) else []
        close = difflib.get_close_matches(path, there, n=1) if not os.path.exists(path) else ()
        fail(f"config file '{path}' {'is a folder' if os.path.isdir(path) else 'does not exist'}"
             + (f", did you mean '{close[0]}'?" if close else ""))
    assigned = {"__file__": path}
    try:
        with open(path, "rb") as f:  # bytes: Python finds out the encoding
            exec(compile(f.read(), path, "exec"), assigned)
    except (Exception, SystemExit) as e:
        fail(f"config file '{path}' cannot be run: {type(e).__name__}: {e}")
    return {key: value for key, value in assigned.items()
            if not key.startswith("_") and not isinstance(value, types.ModuleType) and not callable(value)}


def load(script, argv):
    """script: the module whose Config dataclass is the schema; argv: [path of a config file, '--key=value', ...].

    Returns a Config; its `name` is the file's name without .py, unless set. Exits with one line on a missing or broken
    file, an unknown key (with the nearest known one), or a value that the key does not take.
    """
    if "--help" in argv or "-h" in argv or not argv:
        say(usage(script))
        sys.exit(0 if argv else 2)
    path, *flags = argv
    if path.startswith("--"):
        fail(f"the first argument is a config file, such as configs/sorting_discrete.py; got '{path}'")
    kinds = {f.name: f.type for f in dataclasses.fields(script.Config)}
    values = {"name": os.path.splitext(os.path.basename(path))[0]}
    assigned = assignments(path)
    for flag in flags:
        key, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not equals:
            fail(f"expected --key=value, such as --seed=1 or --resume=True, got '{flag}'")
        try:
            assigned[key] = text if kinds.get(key) is str else ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            assigned[key] = text  # a bare word is a string
    for key, value in assigned.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f", did you mean '{close[0]}'?" if close else f"; known: {', '.join(kinds)}"
            fail(f"unknown config key '{key}'{hint}")
        values[key] = check_value(key, value, kinds[key])
    for key in {"base", "task"} & values.keys():  # paths, and the flags of a base
        file, *more = re.split(r"\s+(?=--)", values[key])
        beside = [os.path.join(os.path.dirname(path), each) for each in (file, os.path.basename(file))]
        found = [each for each in (file, *beside) if os.path.isfile(each)]
        if found and found[0] != file:  # run from another folder: it stands beside the config file
            say(f"'{file}' is not in this folder: config key '{key}' is taken to be '{found[0]}'")
            values[key] = " ".join((found[0], *more))
    name = values["name"]
    if name != os.path.basename(name) or name in ("", ".", "..") or not name.isprintable():
        fail(f"config key 'name' names a folder in out/, got {name!r}")
    for field in dataclasses.fields(script.Config):
        if field.name not in values and field.default is field.default_factory:  # both MISSING: it has no default
            fail(f"config file '{path}' says nothing about '{field.name}'")
    return script.Config(**values)
