#!/usr/bin/env bash
# Guess: with `pytest -n 2 --dist loadgroup` all tests that carry the same xdist_group mark run on one worker, whatever
#   release of pytest it is.
# What happens: with pytest 9.2 the marks are ignored without a word: tests of one group run on both workers. pytest-xdist
#   tells workers apart by a suffix that it writes into a private attribute of the test items; pytest 9.2 computes ids
#   from an object of its own and no longer reads that attribute. With pytest 9.1 the groups hold.
# Whom it hurts: suites whose groups share something expensive or exclusive: a training run that several tests look at is
#   made once per worker (ours took almost twice as long, and nothing failed), a port or a GPU is used by two at once.
# Seen with: pytest 9.2.0 and 9.1.1, pytest-xdist 3.8.0, Python 3.11. Printed:
#   pytest 9.1.1: the six tests of group a ran on workers gw0
#   pytest 9.2.0: the six tests of group a ran on workers gw0 gw1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >test_groups.py <<'EOF'
import os
import time

import pytest


@pytest.mark.xdist_group("a")
@pytest.mark.parametrize("i", range(6))
def test_a(i):
    time.sleep(0.3)
    with open(os.environ["SEEN"], "a") as f:
        f.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")


@pytest.mark.xdist_group("b")
@pytest.mark.parametrize("i", range(6))
def test_b(i):
    time.sleep(0.3)
EOF
python3 -m venv venv
for version in 9.1.1 9.2.0; do
    venv/bin/pip install -q pytest==$version pytest-xdist==3.8.0
    SEEN="$folder/seen-$version" venv/bin/python -m pytest -q -p no:cacheprovider -n 2 --dist loadgroup test_groups.py >/dev/null
    echo "pytest $version: the six tests of group a ran on workers $(sort -u "seen-$version" | xargs)"
done
[ "$(sort -u seen-9.1.1 | wc -l)" = 1 ]
[ "$(sort -u seen-9.2.0 | wc -l)" = 2 ]
