"""Makes the top level importable, trains one tiny base for all tests that need one, and halves the wait."""
import os
import subprocess
import sys
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
OTHER_HALF = ["test_pipeline.py", "test_posterior.py"]  # take as long as all other files
collect_ignore = []


def pytest_configure(config):
    """`python -m pytest` leaves half of the suite, and half of the cores, to a second process."""
    config.other = None
    if not config.invocation_params.args and hasattr(os, "sched_setaffinity"):
        collect_ignore.extend(OTHER_HALF)
        config.output = tempfile.TemporaryFile("w+")
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[1::2] or cores)  # which it inherits: two processes on all cores hinder each other
        config.other = subprocess.Popen(
            [sys.executable, "-m", "pytest", *(os.path.join(ROOT, "tests", name) for name in OTHER_HALF)],
            stdout=config.output, stderr=subprocess.STDOUT)
        os.sched_setaffinity(0, cores[::2])


def pytest_sessionfinish(session, exitstatus):
    if other := session.config.other:
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            other.terminate()
        of_other = other.wait()
        session.exitstatus = exitstatus or of_other


def pytest_terminal_summary(config):
    if config.other:
        config.output.seek(0)
        print(f"\n\nbeside them, {', '.join(OTHER_HALF)}:\n{config.output.read()}")


@pytest.fixture(scope="session", autouse=True)
def short_searches():
    """Clusters are searched for without merging and splitting again, which takes two thirds of a short run."""
    import posterior
    whole = posterior.TRIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior, "TRIES", 0)
        yield whole


@pytest.fixture
def whole_searches(short_searches, monkeypatch):
    """Where clusters are what is tested, or a run is compared with that of another program."""
    monkeypatch.setattr("posterior.TRIES", short_searches)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder like the repository's root: configs/ beside an out/ that holds a trained tiny base."""
    from harness import config
    import train_base
    folder = tmp_path_factory.mktemp("workplace")
    os.symlink(os.path.join(ROOT, "configs"), folder / "configs")
    before = os.getcwd()
    os.chdir(folder)
    train_base.train(config.load(train_base, ["configs/tiny_base.py", "--steps=160"]))
    yield folder
    os.chdir(before)


@pytest.fixture(scope="session")
def trained(workplace):
    """The tiny base, and two sets of 512 of its own samples for different draws of inputs."""
    import factorize
    import train_base
    base, task, _ = train_base.load_base("out/tiny_base/ckpt.pt")
    return base, *(factorize.sample_responses(base, task, 512, 1, key) for key in ("trained", "other"))
