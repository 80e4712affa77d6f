"""Makes the top level importable, and trains one tiny base for all tests that need one."""
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


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
