"""Makes the top level importable, and trains one tiny base and one tiny factorization for all tests that need them."""
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder like the repository's root: configs/ beside an out/ that holds a trained tiny base."""
    import configs
    import train_base
    folder = tmp_path_factory.mktemp("workplace")
    os.symlink(os.path.join(ROOT, "configs"), folder / "configs")
    before = os.getcwd()
    os.chdir(folder)
    train_base.train(configs.load(train_base, ["configs/tiny_base.py", "--steps=160"]))
    yield folder
    os.chdir(before)
