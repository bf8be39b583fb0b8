#!/bin/sh
# Makes .venv with everything promptmill needs. Called by `make setup`; $1 is cpu or gpu.
# Every way this can fail ends in one line that says what to do.
set -u

device=${1:-cpu}
uv_version=0.13.9
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
cd "$root" || exit 1
venv=.venv

fail() {
    echo "promptmill setup: $*" >&2
    exit 1
}

case $device in
cpu | gpu) ;;
*) fail "DEVICE=$device is not known; use DEVICE=cpu or DEVICE=gpu" ;;
esac

# A name on the PATH may be a shim without an interpreter behind it, so each candidate is run.
python=
for candidate in python3.11 python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
        >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "Python 3.11 or 3.12 is needed and neither was found on the PATH"

"$python" tools/preflight.py "$root" || exit 1

# The CPU and the GPU build of torch share a version number, so an installer takes the one for the
# other: a change of device needs a fresh environment.
if [ -e "$venv" ]; then
    if [ "$(cat "$venv/device" 2>/dev/null)" != "$device" ] \
        || ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
        rm -rf "$venv" || fail "the old $venv cannot be removed"
    fi
fi
if [ ! -e "$venv" ]; then
    echo "promptmill setup: making $venv with $("$python" --version)"
    if ! reason=$("$python" -m venv "$venv" 2>&1); then
        rm -rf "$venv"
        fail "$python cannot make an environment (on Debian, install python3-venv):" \
            "$(echo "$reason" | tail -n 1)"
    fi
    echo "$device" >"$venv/device"
fi

uv="$venv/bin/uv"
if [ "$("$uv" --version 2>/dev/null | cut -d ' ' -f 2)" != "$uv_version" ]; then
    "$venv/bin/python" -m pip install --quiet --retries 2 "uv==$uv_version" \
        >"$venv/setup.log" 2>&1 \
        || fail "uv cannot be fetched; is the package index in reach? ($venv/setup.log has pip's words)"
fi

# uv reads UV_FIND_LINKS only; a folder of wheels that was meant for pip serves it as well.
# Not for the GPU: a CPU build of torch in that folder would pass for the other one.
UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
if [ -n "$UV_FIND_LINKS" ] && [ "$device" = cpu ]; then
    export UV_FIND_LINKS
else
    unset UV_FIND_LINKS
fi

install() {
    "$uv" pip install --compile-bytecode --python "$venv/bin/python" --constraints constraints.txt "$@"
}

echo "promptmill setup: installing packages for the $device (3.5 GB, kept in uv's cache)"
if [ "$device" = gpu ]; then
    # Beside the GPU build of torch its companions load, and vLLM makes use of them.
    grep -v '^torch' overrides.txt >"$venv/overrides.txt"
    install --overrides "$venv/overrides.txt" -e '.[gpu,model,dev]' \
        || fail "the packages could not be installed; uv's last lines above say why"
else
    # The CPU build of torch is not on the ordinary index: a folder of wheels has it, or PyTorch's
    # own index. Which of the two is likely decides which one is asked first.
    if [ -n "${UV_FIND_LINKS:-}" ]; then
        first='' second='--torch-backend=cpu'
    else
        first='--torch-backend=cpu' second=''
    fi
    # shellcheck disable=SC2086  # an empty choice must vanish
    install --overrides overrides.txt $first -e '.[cpu,model,dev]' || {
        echo "promptmill setup: trying the other source of torch's CPU build" >&2
        install --overrides overrides.txt $second -e '.[cpu,model,dev]'
    } || fail "the packages could not be installed; uv's last lines above say why"
fi

"$venv/bin/python" -m workers.bundled || fail "the bundled model could not be made ready"
