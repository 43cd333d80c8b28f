#!/usr/bin/env bash
# Makes .venv beside this script, with everything nanoengine needs. It changes nothing outside of .venv, but for
# the folder nanoengine.egg-info that an editable install leaves here. Running it again repairs what is missing.
set -euo pipefail

readonly MIN_MINOR=11 MAX_MINOR=13 # Python 3.x; pyproject.toml's requires-python says the same
readonly MIN_TORCH=2.9
readonly CPU_INDEX=https://download.pytorch.org/whl/cpu

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly root
readonly venv=$root/.venv
readonly venv_python=$venv/bin/python
readonly constraints=$venv/constraints.txt
readonly log=$venv/setup.log

dev=0 eval=0 dry_run=0 verbose=0 python='' torch_choice=auto torch_index=''
torch_version='' torch_kind='' # what .venv holds: "2.13.0+cpu" and "cpu" or "cuda"

usage() {
    cat <<USAGE
usage: ./setup_env.sh [options]

Makes .venv with nanoengine and the tested versions of what it needs, and checks it.

  --dev               also the test tools, ruff, mypy and (on Linux) Triton
  --eval              also lm-eval, which one test runs; 47 packages, a minute or more
  --python PATH       the Python to make .venv with (3.$MIN_MINOR to 3.$MAX_MINOR; default: the first one found)
  --torch cpu|cuda    the build of PyTorch; default: CUDA where there is an NVIDIA device, else CPU
  --torch-index URL   take PyTorch from this package index, even when .venv has one
  --dry-run           say what would be done, and do nothing
  --verbose           show pip's own output
  --help              this text

A PyTorch >= $MIN_TORCH that is already in .venv is kept unless --torch or --torch-index ask for another.
USAGE
}

# ---- messages -------------------------------------------------------------------------------------------------

if [ -t 1 ] && [ -t 2 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
    red=$'\033[31m' green=$'\033[32m' yellow=$'\033[33m' bold=$'\033[1m' plain=$'\033[0m'
else
    red='' green='' yellow='' bold='' plain=''
fi

step() { printf '%s==>%s %s\n' "$bold" "$plain" "$1"; }
ok() { printf '%s ok%s %s\n' "$green" "$plain" "$1"; }
warn() { printf '%swarning:%s %s\n' "$yellow" "$plain" "$1" >&2; }

die() { # MESSAGE [EXIT_CODE]
    printf '%serror:%s %s\n' "$red" "$plain" "$1" >&2
    exit "${2:-1}"
}

# ---- options --------------------------------------------------------------------------------------------------

parse_options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --python | --torch | --torch-index)
                if [ $# -lt 2 ]; then die "$1 needs a value (see --help)" 2; fi
                set_option "$1" "$2"
                shift
                ;;
            --python=* | --torch=* | --torch-index=*) set_option "${1%%=*}" "${1#*=}" ;;
            --dev) dev=1 ;;
            --eval) eval=1 ;;
            --dry-run) dry_run=1 ;;
            --verbose) verbose=1 ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) die "unknown option '$1' (see --help)" 2 ;;
        esac
        shift
    done
}

set_option() { # NAME VALUE
    [ -n "$2" ] || die "$1 needs a value (see --help)" 2
    case $1 in
        --python) python=$2 ;;
        --torch)
            case $2 in
                cpu | cuda) torch_choice=$2 ;;
                *) die "--torch takes 'cpu' or 'cuda', not '$2'" 2 ;;
            esac
            ;;
        --torch-index) torch_index=$2 ;;
    esac
}

check_system() {
    case $(uname -s) in
        MINGW* | MSYS* | CYGWIN*) die "Windows is not supported; run this inside WSL 2" ;;
    esac
    if [ "$torch_choice" = cuda ] && ! on_linux; then
        die "there is no CUDA build of PyTorch for $(uname -s)" 2
    fi
}

on_linux() { [ "$(uname -s)" = Linux ]; }

has_nvidia_device() {
    [ -e /dev/nvidia0 ] || [ -e /proc/driver/nvidia ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}

# ---- Python and .venv -----------------------------------------------------------------------------------------

python_version() { # PYTHON: prints "3.11.7", or nothing when it does not run
    "$1" -I -c 'import platform; print(platform.python_version())' 2>/dev/null || true
}

in_range() { # VERSION
    case $1 in
        3.*) ;;
        *) return 1 ;;
    esac
    local minor=${1#3.}
    minor=${minor%%.*}
    [ "$minor" -ge $MIN_MINOR ] && [ "$minor" -le $MAX_MINOR ]
}

can_make_venv() { # PYTHON: Debian ships Pythons without ensurepip
    "$1" -I -c 'import ensurepip, venv' 2>/dev/null
}

choose_python() { # sets python
    local candidate version found=''
    if [ -n "$python" ]; then
        version=$(python_version "$python")
        [ -n "$version" ] || die "--python: '$python' does not run"
        in_range "$version" || die "--python: '$python' is Python $version; nanoengine needs 3.$MIN_MINOR to 3.$MAX_MINOR"
        can_make_venv "$python" || die "--python: '$python' cannot make environments (on Debian: apt install python3-venv)"
        return
    fi
    # The user's own python3 comes first; the numbered names may be shims that do not run, so each one is asked.
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        version=$(python_version "$candidate")
        [ -n "$version" ] || continue
        if ! in_range "$version"; then
            found="$found, $candidate is $version"
        elif ! can_make_venv "$candidate"; then
            found="$found, $candidate ($version) lacks ensurepip (on Debian: apt install python3-venv)"
        else
            python=$(command -v "$candidate")
            return
        fi
    done
    die "no usable Python: nanoengine needs 3.$MIN_MINOR to 3.$MAX_MINOR; found: ${found#, }${found:+; }use --python PATH for another"
}

venv_is_whole() { "$venv_python" -I -c 'import pip' 2>/dev/null; }

settle_venv() { # keeps a whole .venv of a Python in range, else makes it anew
    local version='' reason='' asked=''
    if [ -e "$venv" ] || [ -L "$venv" ]; then
        [ -d "$venv" ] || die "$venv is in the way: it is not a folder"
        version=$(python_version "$venv_python")
        [ -z "$python" ] || asked=$(python_version "$python")
        if [ -z "$version" ] || ! venv_is_whole; then
            reason="it is incomplete"
        elif ! in_range "$version"; then
            reason="it has Python $version"
        elif [ -n "$asked" ] && [ "${asked%.*}" != "${version%.*}" ]; then
            reason="it has Python $version"
        else
            ok ".venv: Python $version"
            return
        fi
    fi
    choose_python
    step "making .venv with $python ($(python_version "$python"))${reason:+, anew: $reason}"
    [ $dry_run -eq 0 ] || return 0
    "$python" -m venv --clear "$venv" || die "'$python -m venv' failed (on Debian: apt install python3-venv)"
    venv_is_whole || die "$venv has no pip (on Debian: apt install python3-venv)"
}

# ---- pip ------------------------------------------------------------------------------------------------------

run_pip() { # ARGS: quiet; what it said stands in the log
    local command=("$venv_python" -m pip --disable-pip-version-check --no-input "$@")
    if [ $verbose -eq 1 ]; then
        "${command[@]}"
    else
        printf '\n$ pip %s\n' "$*" >>"$log"
        "${command[@]}" >>"$log" 2>&1
    fi
}

die_of_pip() { # MESSAGE
    if [ $verbose -eq 0 ]; then
        tail -n 8 "$log" | sed 's/^/    /' >&2
        die "$1 (pip's whole output: $log)"
    fi
    die "$1"
}

# ---- torch, first and alone -----------------------------------------------------------------------------------

read_torch() { # sets torch_version and torch_kind; reads torch/version.py, as importing torch takes seconds
    local found=''
    if [ -x "$venv_python" ]; then
        found=$("$venv_python" -I - <<'PYTHON' 2>/dev/null || true
import importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    facts = runpy.run_path(str(pathlib.Path(spec.origin).with_name("version.py")))
    print(facts["__version__"], "cuda" if facts.get("cuda") else "cpu")
PYTHON
        )
    fi
    torch_version=${found%% *}
    torch_kind=${found##* }
}

torch_is_recent() {
    local major minor rest
    IFS=. read -r major minor rest <<<"$torch_version"
    : "$rest"
    [ "$major" -gt "${MIN_TORCH%.*}" ] || { [ "$major" -eq "${MIN_TORCH%.*}" ] && [ "$minor" -ge "${MIN_TORCH#*.}" ]; }
}

torch_is_kept() {
    if [ -z "$torch_version" ] || [ -n "$torch_index" ] || ! torch_is_recent; then
        return 1
    fi
    [ "$torch_choice" = auto ] || [ "$torch_choice" = "$torch_kind" ]
}

settle_torch() {
    local pin wanted=$torch_choice
    pin=$(sed -n 's/^torch==//p' "$root/requirements.txt")
    read_torch
    if torch_is_kept; then
        ok "torch $torch_version ($torch_kind build) is in .venv and stays"
        if [ "$torch_kind" = cpu ] && on_linux && has_nvidia_device; then
            warn "there is an NVIDIA device, but torch is a CPU build; --torch cuda replaces it"
        fi
        return
    fi
    if [ "$wanted" = auto ] && on_linux && ! has_nvidia_device; then
        wanted=cpu
    fi
    if [ -n "$torch_index" ]; then
        torch_from_index "$pin" "$torch_index"
    elif [ "$wanted" = cpu ] && on_linux; then
        torch_cpu_build "$pin+cpu"
    else
        step "installing torch $pin from pip's own index"
        [ $dry_run -eq 0 ] || return 0
        install_torch "$pin" || die_of_pip "torch $pin could not be installed; --torch-index URL names another index"
    fi
    [ $dry_run -eq 0 ] || return 0
    read_torch
    [ -n "$torch_version" ] || die_of_pip "torch was installed but is not in .venv"
    if [ "$torch_choice" != auto ] && [ "$torch_choice" != "$torch_kind" ]; then
        die "--torch $torch_choice was asked for, but torch $torch_version is a $torch_kind build; name an index with --torch-index URL"
    fi
    ok "torch $torch_version ($torch_kind build)"
}

install_torch() { # VERSION [PIP OPTIONS]: torch alone; what it needs comes with the rest, under the constraints
    local version=$1
    shift
    if [ -n "$torch_version" ]; then
        set -- --force-reinstall "$@"
    fi
    run_pip install --no-deps "$@" "torch==$version"
}

torch_cpu_build() { # VERSION: a wheel that pip is configured with (find-links) wins over PyTorch's index
    step "installing torch $1 from a local wheel if pip knows one, else from $CPU_INDEX"
    [ $dry_run -eq 0 ] || return 0
    install_torch "$1" --no-index || torch_from_index "$1" "$CPU_INDEX"
}

torch_from_index() { # VERSION URL
    step "installing torch $1 from $2"
    [ $dry_run -eq 0 ] || return 0
    # Extra indexes of the user's configuration are overridden: when this one does not answer, pip would take
    # whatever build they hold. Few retries, so that a dead index is reported in seconds.
    PIP_EXTRA_INDEX_URL=$2 install_torch "$1" --index-url "$2" --retries 1 --timeout 30 ||
        die_of_pip "torch $1 could not be taken from $2; name another index with --torch-index URL, or put a wheel where pip finds it (PIP_FIND_LINKS)"
}

# ---- the rest -------------------------------------------------------------------------------------------------

write_constraints() { # the tested versions, and exactly the torch that is here, so that nothing replaces it
    {
        echo "# written by setup_env.sh; 'pip install -c' this file keeps a later install from replacing torch"
        echo "torch==$torch_version"
        grep -hE '^[A-Za-z0-9_.-]+==' "$root/requirements.txt" "$root/requirements-dev.txt" |
            grep -vE "^torch==$([ "$torch_kind" = cpu ] || echo '|^triton==')" # a CUDA torch names its own triton
    } >"$constraints"
}

install_rest() {
    local what=.
    [ $dev -eq 0 ] || what='.[dev]'
    step "installing nanoengine and what it needs$([ $dev -eq 0 ] || echo ', with the development tools')"
    [ $dry_run -eq 0 ] || return 0
    write_constraints
    # setuptools first and the build in .venv itself: a build environment of its own would be fetched at each run.
    run_pip install -c "$constraints" 'setuptools>=77.0.3' || die_of_pip "setuptools could not be installed"
    run_pip install -c "$constraints" --no-build-isolation --editable "$what" ||
        die_of_pip "the packages could not be installed"
}

install_harness() { # for one test, which is skipped without it: so that it is missing is no reason to stop
    [ $eval -eq 1 ] || return 0
    step "installing lm-eval, which one test runs"
    [ $dry_run -eq 0 ] || return 0
    run_pip install -c "$constraints" 'lm-eval[api]' ||
        warn "lm-eval could not be installed, so tests/launch/test_lm_eval.py will be skipped; see $log"
}

verify() {
    step "checking"
    [ $dry_run -eq 0 ] || return 0
    # From another folder, so that it is the installed packages that answer.
    (cd / && "$venv_python" - $dev) <<'PYTHON' || die "the environment does not work; delete $venv and run this again"
import importlib, os, sys, warnings

warnings.simplefilter("ignore")
names = ["torch", "transformers", "tokenizers", "safetensors", "llguidance", "zmq", "msgpack", "yaml"]
names += ["fastapi", "uvicorn", "configs", "nanoengine", "workers", "launch"]
if sys.argv[1] == "1":
    names += ["pytest", "hypothesis", "httpx", "jsonschema", "openai"]
failed = False
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"    import {name}: {type(error).__name__}: {error}")
        failed = True
if failed:
    sys.exit(1)

import torch

affinity = getattr(os, "sched_getaffinity", None)
print(f"    cpu: {len(affinity(0)) if affinity else os.cpu_count()} cores")
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    memory = torch.cuda.get_device_properties(index).total_memory / 2**30
    print(f"    cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
if not torch.cuda.is_available():
    print("    cuda: none")
PYTHON
    if ! run_pip check; then
        warn "'pip check' finds packages that disagree; see $log"
    fi
    ok "ready. Next: .venv/bin/python -m launch --tp 2"
    [ $dev -eq 0 ] || echo "    or run the tests: .venv/bin/python -m pytest"
}

main() {
    parse_options "$@"
    cd -- "$root"
    # What these name would count as installed in .venv without being there.
    unset PYTHONPATH PYTHONHOME
    export PIP_USER=0
    check_system
    settle_venv
    [ $dry_run -eq 1 ] || : >"$log"
    settle_torch
    install_rest
    install_harness
    verify
}

main "$@"
