#!/usr/bin/env bash
# Install what the tests need and run them; without arguments TEST_PROCESSES files at a time, one per core and at most 8 by default.
# --slow runs all. Other arguments go to pytest.
#
#   bash scripts/test.sh
#   bash scripts/test.sh --slow
#   bash scripts/test.sh tests/test_afdcd.py -x

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment requirements-dev.txt
cd "$ROOT"
"$PYTHON" -m ruff check .
if [ $# = 0 ]; then
    set -- -n "${TEST_PROCESSES:-auto}" --maxprocesses 8 --dist loadfile  # a file's tests share what a fixture has trained
fi
# one thread per process: several processes train at once in some tests
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest "$@"
