# Sourced by the scripts beside it: `environment run` or `environment test` gives them a Python to work with.
#
# The active virtual environment is used when there is one, else .venv in the repository, made here the first time.
# Packages are installed only when pyproject.toml, constraints.txt or the interpreter changed since the last time.
# Afterwards $python is the interpreter; $repository is the absolute path of the checkout.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=""

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_recent() { # is_recent PYTHON: whether it runs and is 3.11 or newer
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() { # prints the first interpreter that is recent enough
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python}; do
    if is_recent "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  local found
  found="$("${PYTHON:-python3}" --version 2>&1 | tail -n 1 || true)"
  fail "vlmalign needs Python 3.11 or newer; ${PYTHON:-python3} is: ${found:-not there}." \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

make_environment() { # makes .venv; a half-made one from an interrupted attempt is completed
  local base
  base="$(find_python)"
  echo "environment: making .venv with $("$base" --version)"
  "$base" -m venv "$repository/.venv" ||
    fail "'$base -m venv .venv' did not work; on Debian and Ubuntu it needs: apt install python3-venv"
}

keep_byte_code() { # keep_byte_code FOLDER: where nothing may be written beside the sources, byte code goes there
  # Without it every process compiles JAX, PyTorch and transformers anew: 25 s for one that imports all three.
  if [[ -n "${PYTHONDONTWRITEBYTECODE:-}" ]]; then
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX="$1"
  fi
}

browser() { # Debian's Chromium for the tests that drive one, where it can be installed; without it they are skipped
  command -v chromium >/dev/null && return
  if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    (timeout 120 apt-get update && timeout 400 apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 </dev/null ||
      echo "environment: Chromium cannot be installed; the tests that need a browser are skipped"
  fi
}

environment() { # environment run|test
  local what="$1" started=$SECONDS
  if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    python="$VIRTUAL_ENV/bin/python"
    is_recent "$python" ||
      fail "vlmalign needs Python 3.11 or newer; the active environment $VIRTUAL_ENV has" \
        "$("$python" --version 2>&1 || true). Leave it (deactivate) or activate another."
  else
    python="$repository/.venv/bin/python"
    if ! is_recent "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then
      make_environment
    fi
  fi

  local extra="" key stamps
  [[ "$what" == test ]] && extra="[test]"
  # The checkout's path counts too: an environment shared by two checkouts holds the package of only one.
  key="$("$python" - "$repository" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([*parts, str(root).encode(), sys.version.encode()])).hexdigest())
PYTHON
  )"
  stamps="$("$python" -c 'import sys; print(sys.prefix)')"
  if [[ "$(cat "$stamps/vlmalign-$what.stamp" 2>/dev/null)" != "$key" ]]; then
    echo "environment: installing vlmalign$extra and what it needs (about a minute, longer on a slow network)"
    local log
    log="$(mktemp)"
    # Byte code is compiled at first import instead: only for the modules that are used.
    if ! "$python" -m pip install --disable-pip-version-check --no-input --no-compile \
      --editable "$repository$extra" --constraint "$repository/constraints.txt" >"$log" 2>&1 </dev/null; then
      grep -v '^Requirement already satisfied' "$log" | tail -n 20 >&2
      fail "pip could not install vlmalign$extra; its last lines are above, all of them in $log"
    fi
    rm -f "$log"
    echo "$key" >"$stamps/vlmalign-run.stamp" # the test extra contains everything a run needs
    if [[ "$what" == test ]]; then
      echo "$key" >"$stamps/vlmalign-test.stamp"
    fi
  fi
  keep_byte_code "$stamps/bytecode"
  echo "environment: ready after $((SECONDS - started)) s ($("$python" --version), $stamps)"
}
