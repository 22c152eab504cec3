#!/usr/bin/env bash
# Lint, tests and the deviation report, in an environment of their own. `bash test.sh --help` tells the rest.
set -euo pipefail

usage() {
    cat <<'EOF'
bash test.sh [options] [pytest arguments]

Installs the package with the pinned versions, runs ruff and pytest, and prints how far the results are from
transformers' (python -m qwen_batched.deviation). Works in the active virtual environment if there is one, else in .venv,
which it makes. A second run installs nothing unless pyproject.toml or constraints.txt have changed.

  --fast                  only ruff, and of every test that is not marked slow the first case, for every change
  --no-install            install nothing, make nothing: use the current python as it is, with its own torch
  --transformers VERSION  test against that version of transformers, in .venv-transformers-VERSION
  --model FOLDER_OR_ID    the checkpoint that the deviation report is made with
  -h, --help              print this

Everything else goes to pytest, with paths relative to the repository:
  bash test.sh -k padding
  bash test.sh --no-install -m gpu      only the tests that need an NVIDIA GPU, on a machine without network
EOF
}

die() {
    echo "test.sh: $1" >&2
    exit 2
}

start_dir=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ---------------------------------------------------------------------------------------------------- arguments

install=true
fast=false
transformers_version=
model=
pytest_args=()

while (($#)); do
    case $1 in
        --fast) fast=true ;;
        --no-install) install=false ;;
        --transformers | --model)
            (($# >= 2)) && [[ -n $2 ]] || die "$1 needs a value"
            if [[ $1 == --model ]]; then model=$2; else transformers_version=$2; fi
            shift
            ;;
        --transformers=?*) transformers_version=${1#*=} ;;
        --model=?*) model=${1#*=} ;;
        --transformers= | --model=) die "${1%=} needs a value" ;;
        -h | --help) usage && exit 0 ;;
        *) pytest_args+=("$1") ;;
    esac
    shift
done

if [[ -n $transformers_version ]]; then
    $install || die "--transformers makes an environment of its own, so it cannot go with --no-install"
    [[ $transformers_version =~ ^[0-9][0-9A-Za-z.]*$ ]] || die "--transformers takes a version such as 4.51.3"
fi
if $fast; then
    [[ -z $model ]] || die "--fast leaves the deviation report out, so it cannot go with --model"
    pytest_args=(-m "not slow and not more" ${pytest_args[@]+"${pytest_args[@]}"})
fi
# A folder named relative to where the caller stands must survive the cd below.
if [[ -n $model && -d $start_dir/$model ]]; then model=$start_dir/$model; fi
cd "$root"

# -------------------------------------------------------------------------------------------------- environment

# The first interpreter that runs, is new enough and can make virtual environments: a name on PATH may be an empty shim.
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    die "found no Python 3.10 or newer with the venv module (on Debian and Ubuntu: apt install python3-venv)"
}

make_venv() {
    local folder=$1 base
    [[ -x $folder/bin/python ]] && "$folder/bin/python" -m pip --version >/dev/null 2>&1 && return
    base=$(find_python)
    echo "making $folder with $("$base" --version)"
    "$base" -m venv --clear "$folder"
}

constraints=constraints.txt
made_constraints=

# Installs into the environment of $python, unless its stamp says that just this was installed before.
install_package() {
    local stamp wanted
    stamp=$("$python" -c 'import sys; print(sys.prefix)')/.qwen_batched-installed
    wanted="$root transformers=${transformers_version:-pinned} $(cat pyproject.toml constraints.txt | cksum)"
    [[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && return

    if [[ -n $transformers_version ]]; then
        # Another transformers needs other versions of the two packages that it moves together with.
        constraints=$(mktemp)
        made_constraints=$constraints
        trap 'rm -f "$made_constraints"' EXIT
        grep -viE '^(transformers|tokenizers|huggingface[-_]hub) *==' constraints.txt >"$constraints"
        echo "transformers==$transformers_version" >>"$constraints"
    fi
    echo "installing into $(dirname "$stamp"), which can take minutes the first time"
    rm -f "$stamp"
    "$python" -m pip install -qq --no-input --disable-pip-version-check -c "$constraints" -e ".[test]"
    echo "$wanted" >"$stamp"
}

if ! $install; then
    python=$(command -v python || command -v python3) || die "found no python"
else
    if [[ -n $transformers_version ]]; then
        venv=$root/.venv-transformers-$transformers_version
        make_venv "$venv"
    elif [[ -x ${VIRTUAL_ENV:-}/bin/python ]]; then
        venv=$VIRTUAL_ENV
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || die "$venv has no pip: give it one, or use --no-install"
    else
        venv=$root/.venv
        make_venv "$venv"
    fi
    python=$venv/bin/python
    install_package
fi
"$python" - <<'EOF'
import platform
from importlib.metadata import PackageNotFoundError, version

def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"

print(f"Python {platform.python_version()}, " + ", ".join(map(installed, ("torch", "transformers", "triton"))))
EOF

# -------------------------------------------------------------------------------------------------------- checks

failed=()

# Every check runs, whatever failed before it: one run tells all there is to know.
check() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

if "$python" -m ruff --version >/dev/null 2>&1; then
    check "ruff check" "$python" -m ruff check .
    check "ruff format" "$python" -m ruff format --check .
else
    printf '\nruff is not installed here: lint and format were not checked\n'
fi
# Each core takes a share of the tests, and from another's when it is done; on a GPU they take turns.
workers=()
if [[ " ${pytest_args[*]-} " != *" --pdb "* ]] &&
    "$python" -c 'import sys, torch, xdist; sys.exit(torch.cuda.is_available())' 2>/dev/null; then
    workers=(-n logical --dist worksteal)
fi
# By itself the report has a size more, as large as these together; parity tests have it too.
report=("$python" -m qwen_batched.deviation)
if [[ -n $model ]]; then report+=(--model "$model"); else report+=(--sizes 224 252 252x308); fi
if ! $fast && [[ -z $model ]]; then
    # A small model, whose threads would only wait for each other. On a CPU it takes its turns beside the tests'.
    report=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "${report[@]}")
    if ((${#workers[@]})); then
        printed=$(mktemp)
        "${report[@]}" >"$printed" 2>&1 &
        beside=$!
        trap 'kill "$beside" 2>/dev/null || true; rm -f "$printed" "$made_constraints"' EXIT
        report=(wait_for_report)
    fi
fi
wait_for_report() {
    local code=0
    wait "$beside" || code=$?
    cat "$printed"
    return $code
}
check "pytest" "$python" -m pytest ${workers[@]+"${workers[@]}"} ${pytest_args[@]+"${pytest_args[@]}"}
$fast || check "deviation from transformers" "${report[@]}"

if ((${#failed[@]})); then
    printf '\nFAILED:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
printf '\nall checks passed\n'
