#!/usr/bin/env bash
# bash scripts/quickstart.sh [--run DIR] [--set a.b=c ...]
#
# The whole pipeline in miniature, from films to a report, on two CPU cores in a few minutes. Needs only Python 3.11
# or newer and pip. The run folder is runs/quickstart unless --run names another; paths are relative to the
# repository. Interrupted, it continues where it was when started again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

run=runs/quickstart
previous=""
for argument in "$@"; do
  [[ "$previous" == --run ]] && run="$argument"
  [[ "$argument" == --run=* ]] && run="${argument#--run=}"
  previous="$argument"
done

environment run
cd "$repository"
"$python" -m vlmalign.cli run configs/chexreason/quickstart.yaml --run "$run" "$@"

echo "quickstart: $SECONDS s in all, environment included"
if [[ -f "$run/report.html" ]]; then
  echo "report: $(cd "$run" && pwd)/report.html"
else
  fail "the run ended without a report in $run"
fi
