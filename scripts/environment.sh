# Sourced by run.sh and test.sh: makes .venv if it is missing and installs requirement files whenever they have changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

install() {  # install FILE...: into .venv, unless these very files were installed last under this name
    local stamp wanted
    stamp="$root/.venv/.installed-$(basename "$(dirname "$1")")"
    [ -x "$root/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$root/.venv"
    wanted=$(cat "$@" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        local arguments=()
        for file in "$@"; do arguments+=(-r "$file"); done
        echo "Installing $* into .venv (once)" >&2
        "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" >&2
        echo "$wanted" > "$stamp"
    fi
}
