#!/usr/bin/env bash
# bash scripts/test.sh [pytest arguments]
#
# Formatting, lint and every test that is not marked `full` or `soak`. Needs only Python 3.11 or newer and pip.
# Arguments go to pytest: `bash scripts/test.sh -k config -x`.
#
# bash scripts/test.sh full [pytest arguments]
#
# The same with the tests marked `full`: everything but `soak`.
#
# bash scripts/test.sh half 0|1 [pytest arguments]
#
# One half of the tests marked `full`, alone; the other number runs the other half.
#
# bash scripts/test.sh parity --count N [--seed S] [--family F] [--write FOLDER]
#
# N random configurations of every family (or of F) against transformers: logits, gradients, greedy answers.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

check_style() {
  "$python" -m ruff format --check --quiet --output-format concise . || fail "some files are not formatted; run: ruff format ."
  "$python" -m ruff check --quiet --output-format concise . || fail "ruff found the problems above"
}

run_tests() { # run_tests MARKERS [pytest arguments]
  # Two processes, whole files each, in conftest.py's order: most of the time goes into compiling, which uses one core.
  "$python" -m pytest -m "$1" -n 2 --dist loadfile --no-loadscope-reorder "${@:2}"
}

environment test
cd "$repository"

# Many tests compile the same programs in processes of their own: one cache for the run, nothing too small for it.
JAX_COMPILATION_CACHE_DIR="$(mktemp -d)"
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
export JAX_COMPILATION_CACHE_DIR
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0
# The reference models' OpenMP threads would otherwise spin between operations and take the cores from JAX.
export OMP_WAIT_POLICY=PASSIVE

if [[ "${1:-}" == parity ]]; then
  shift
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_DEFAULT_MATMUL_PRECISION=highest
  # No configuration is drawn twice in a run: nothing compiled is worth keeping.
  PYTHONPATH=tests:tests/parity JAX_ENABLE_COMPILATION_CACHE=false "$python" tests/parity/sweep.py "$@"
  exit
fi

case "${1:-}" in
full)
  check_style
  run_tests "not soak" "${@:2}"
  ;;
half)
  [[ "${2:-}" == [01] ]] || fail "half 0 or half 1, found: half ${2:-}"
  run_tests "full and not soak" --half "$2" "${@:3}"
  ;;
*)
  check_style
  # Most of the time goes into compiling programs that run for milliseconds. `full` and `half` compile as for users.
  export JAX_DISABLE_MOST_OPTIMIZATIONS=true
  run_tests "not full and not soak" "$@"
  ;;
esac
echo "tests: passed, $SECONDS s in all"
