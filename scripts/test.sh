#!/usr/bin/env bash
# Install what the tests need and run them: about a quarter of an hour on two cores; --slow runs all. Other arguments go to pytest.
#
#   bash scripts/test.sh
#   bash scripts/test.sh --slow
#   bash scripts/test.sh tests/test_afdcd.py -x

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment requirements-dev.txt
cd "$ROOT"
"$PYTHON" -m ruff check .
# one thread per process: several processes train at once in some tests
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest "$@"
