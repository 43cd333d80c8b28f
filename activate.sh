# Source it from bash or zsh, `source activate.sh`: it activates the .venv that setup_env.sh made.
# shellcheck shell=bash

_nanoengine_activate() {
    local script sourced=0
    if [ -n "${ZSH_VERSION:-}" ]; then
        # zsh: the prompt expansion %x is the sourced file; bash cannot parse the short form, so it goes through eval.
        eval 'script=${(%):-%x}'
        case ${ZSH_EVAL_CONTEXT:-} in *:file*) sourced=1 ;; esac
    else
        script=${BASH_SOURCE[0]}
        [ "${FUNCNAME[1]:-}" != source ] || sourced=1
    fi
    local folder
    folder=$(cd -- "$(dirname -- "$script")" && pwd) || return 1
    if [ $sourced -eq 0 ]; then
        echo "error: this script changes the shell it is read by; run: source activate.sh" >&2
        return 1
    fi
    if [ ! -f "$folder/.venv/bin/activate" ]; then
        echo "error: there is no environment in $folder/.venv; run ./setup_env.sh first" >&2
        return 1
    fi
    # shellcheck disable=SC1091
    . "$folder/.venv/bin/activate"
}

_nanoengine_activate
