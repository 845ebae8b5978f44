# Sourced by the scripts beside this file: keeps .venv in step with the two pyproject.toml and constraints.txt.
# An install happens only when one of them (or the checkout's place) has changed since the last one.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
scratch=$root/.run

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

# The first Python on PATH that is new enough; the exact name that we test with comes first.
find_python() {
    local name
    for name in python3.11 python3 python3.12 python3.13 python; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    die "tracehaul needs Python 3.11 or newer, and found none on PATH." \
        "Install python3.11 (on Debian or Ubuntu: python3.11 and python3.11-venv) and run this again."
}

# phase MESSAGE COMMAND...: runs quietly, shows that it lives, and shows the output's end if it fails.
phase() {
    local message=$1 log=$scratch/setup.log status=0 began=$SECONDS tick=0 pid detail
    shift
    "$@" >"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM HUP
    while kill -0 "$pid" 2>/dev/null; do
        detail=$(grep -oE '^ *(Collecting|Downloading|Building|Preparing|Installing) [^ ,;<>=~!(]+' "$log" | tail -n 1 || true)
        detail=${detail/Installing collected/Unpacking}
        if [ -t 2 ]; then
            printf '\r\033[K%s  %ds  %s' "$message" $((SECONDS - began)) "${detail#"${detail%%[! ]*}"}" >&2
        elif [ $((tick % 50)) -eq 0 ]; then
            printf '%s  %ds  %s\n' "$message" $((SECONDS - began)) "${detail#"${detail%%[! ]*}"}" >&2
        fi
        tick=$((tick + 1))
        sleep 0.2
    done
    wait "$pid" || status=$?
    trap - INT TERM HUP
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
    if [ "$status" -ne 0 ]; then
        tail -n 15 "$log" >&2
        die "$message: failed (the whole output is in $log)"
    fi
    printf '%s  done in %ds\n' "$message" $((SECONDS - began)) >&2
}

# ensure_venv [EXTRA]: .venv has this checkout installed, with that extra's packages.
ensure_venv() {
    local extra=${1:-} want stamp python
    want="$(cat pyproject.toml store/pyproject.toml constraints.txt | cksum) $root"
    stamp=$venv/.tracehaul${extra:+-$extra}
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        return
    fi
    # Two first runs at once would write into each other's installation.
    mkdir -p "$scratch"
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$scratch/setup.lock"
        flock -n 9 || die "Another script is installing into $venv: wait until it is done."
    fi
    if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        python=$(find_python)
        phase "Making a virtual environment with $("$python" --version)" "$python" -m venv --clear "$venv"
    fi
    phase "Installing tracehaul${extra:+ with its $extra tools} (the first time takes a minute or more)" \
        "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -c constraints.txt \
        -e ./store -e ".${extra:+[$extra]}"
    printf '%s' "$want" >"$stamp"
    # Whatever an extra installs includes the plain installation.
    printf '%s' "$want" >"$venv/.tracehaul"
    exec 9>&-
}
