# Sourced by the commands: makes .venv if it is missing and installs requirement files whenever they have changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

install() {  # install FILE...: into $venv, unless these very files were installed last under this name
    local stamp wanted
    stamp="$venv/.installed-$(basename "$(dirname "$1")")"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    wanted=$(cat "$@" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        local arguments=()
        for file in "$@"; do arguments+=(-r "$file"); done
        echo "Installing $* into ${venv#"$root"/} (once)" >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" >&2
        echo "$wanted" > "$stamp"
    fi
}
