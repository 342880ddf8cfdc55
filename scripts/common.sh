# Sourced by the scripts beside it: where things are, and how steps are reported.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
cd -- "$root"

say() { printf '== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

# part NAME COMMAND...: runs one part of a longer check and remembers how it went. A failed part
# does not stop those after it; `summary` makes the whole fail. Sets part_ok to 1 or 0. Call it as a
# plain command: inside `if` or before `||`, bash would go on after a failing command of the part.
parts=()
parts_failed=0
part() {
  local name=$1 started=$SECONDS status result=passed
  shift
  printf '\n'
  say "$name"
  set +e
  (
    set -e
    "$@"
  )
  status=$?
  set -e
  part_ok=1
  if [ "$status" -ne 0 ]; then
    part_ok=0
    result=FAILED
    parts_failed=$((parts_failed + 1))
    say "$name FAILED"
  fi
  parts+=("$(printf '%-8s %4d s  %s' "$result" $((SECONDS - started)) "$name")")
}

# Records a part that could not run because an earlier one failed; counts as a failure.
part_not_run() {
  parts+=("$(printf '%-8s %6s  %s' 'NOT RUN' '' "$1")")
  parts_failed=$((parts_failed + 1))
}

summary() {
  printf '\n'
  say "$1:"
  printf '   %s\n' "${parts[@]}"
  if [ "$parts_failed" -ne 0 ]; then die "== $1 FAILED ($parts_failed of ${#parts[@]} parts)"; fi
  say "$1 passed (${#parts[@]} parts, $SECONDS s)"
}
