import os
import sys

import pytest
import torch

os.environ["SDL_VIDEODRIVER"] = "dummy"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)
# The longest work comes first: training runs (see test_learning.py), then these files.
FIRST = "genie-minatar ha2018-dream ha2018-car dreamerv3-minatar iris-catch diamond-minatar".split()
LONG = "test_faults test_ijepa_faults test_ijepa_numbers test_environments test_benchmarks".split()


@pytest.hookimpl(tryfirst=True)  # NOTE: pytest-xdist's own hook reads the marks, so they must be there before it
def pytest_collection_modifyitems(items):
    """Two workers (pytest-xdist, see pyproject.toml) take groups of tests in turns: a training run with all tests of it
    is one, any other file is one."""

    def group(item):
        mark = item.get_closest_marker("xdist_group")
        return mark.args[0] if mark else item.path.stem

    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group(item)))
    order = [f"learning-{name}" for name in FIRST]
    place = {name: i for i, name in enumerate(order + ["learning"] + LONG)}
    rest = lambda name: place["learning"] if name.startswith("learning-") else len(place)  # noqa: E731
    items.sort(key=lambda item: place.get(group(item), rest(group(item))))
