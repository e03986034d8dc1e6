# shellcheck shell=bash
# Sourced by tools/test and tools/quickstart: finds a Python, makes the environment, installs the pinned packages once.

show() { # show COMMAND...: prints the command as one would type it
    local word line='$'
    for word in "$@"; do
        case "$word" in
            *[!A-Za-z0-9_./:=,+-]*) line="$line '$word'" ;;
            *) line="$line $word" ;;
        esac
    done
    printf '%s\n' "$line"
}

usable_python() { # usable_python CANDIDATE [VERSION]: does it run, and is it VERSION (or at least 3.11)?
    "$1" - "${2:-}" >/dev/null 2>&1 <<'PYTHON'
import sys

wanted = tuple(int(part) for part in sys.argv[1].split(".")) if sys.argv[1] else ()
sys.exit(not (sys.version_info >= (3, 11) and sys.version_info[: len(wanted)] == wanted))
PYTHON
}

find_python() { # find_python [VERSION | PATH]: prints the interpreter to make the environment with
    local version="${1:-}" candidate
    case "$version" in
        */*)
            usable_python "$version" && { printf '%s\n' "$version"; return 0; }
            echo "error: '$version' is not a Python 3.11 or newer that runs" >&2
            return 2
            ;;
        *[!0-9.]*)
            echo "error: --python wants a version like 3.13 or the path of an interpreter, got '$version'" >&2
            return 2
            ;;
    esac
    for candidate in ${version:+"python$version"} python3 python3.13 python3.12 python3.11 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"${version:-3}"*/bin/python; do
        usable_python "$candidate" "$version" && { printf '%s\n' "$candidate"; return 0; }
    done
    echo "error: no Python ${version:-3.11 or newer} on PATH or under pyenv; install one, or name it with --python" >&2
    return 2
}

python_version() { # python_version PYTHON: prints 3.13
    "$1" -c 'import sys; print("{}.{}".format(*sys.version_info))'
}

fingerprint() { # fingerprint PYTHON EXTRAS: changes when the interpreter, the extras or the pinned packages do
    "$1" - "$2" pyproject.toml tools/constraints.txt <<'PYTHON'
import hashlib
import pathlib
import sys

parts = [sys.version, *sys.argv[1:2], *(pathlib.Path(name).read_text() for name in sys.argv[2:])]
print(hashlib.sha256("\0".join([str(pathlib.Path.cwd()), *parts]).encode()).hexdigest())
PYTHON
}

make_environment() { # make_environment FOLDER EXTRAS [VERSION | PATH]: afterwards FOLDER/bin/python has jaxlm[EXTRAS]
    local folder="$1" extras="$2" wanted="${3:-}" python stamp
    local bin="$folder/bin/python" began=$SECONDS held
    if [ -e "$bin" ] && ! usable_python "$bin"; then
        echo "error: $bin does not run, or is older than Python 3.11; remove the folder $folder" >&2
        return 2
    fi
    case "$wanted" in
        "" | */*) ;;
        *) if [ -e "$bin" ] && ! usable_python "$bin" "$wanted"; then
            echo "error: $folder holds Python $(python_version "$bin"), not $wanted; remove that folder first" >&2
            return 2
        fi ;;
    esac
    if ! "$bin" -m pip --version >/dev/null 2>&1; then
        python="$(find_python "$wanted")" || return
        show "$python" -m venv "$folder"
        "$python" -m venv "$folder" || return
    fi
    for held in "$extras" test; do # the test extras hold everything else
        stamp="$folder/.installed-${held:-core}"
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "$bin" "$held")" ]; then
            return 0
        fi
    done
    stamp="$folder/.installed-${extras:-core}"
    rm -f "$stamp"
    set -- "$bin" -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".${extras:+[$extras]}"
    show "$@"
    echo "installing; the first time takes a minute or two"
    "$@" || return
    fingerprint "$bin" "$extras" >"$stamp"
    echo "$folder is ready ($((SECONDS - began)) s)"
}
