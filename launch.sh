#!/usr/bin/env bash
# The one command: sets up .venv on first use, then trains (or tests). `./launch.sh --help` says how.
set -euo pipefail

caller_folder=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage() {
    cat <<'EOF'
usage: ./launch.sh [CONFIG.toml] [section.key=value ...]   train both experts (default: configs/pocket.toml, on a CPU)
       ./launch.sh test [pytest arguments]                 install the test extra and run the tests
       ./launch.sh --help

The first run makes .venv and installs into it; a later one starts at once, unless pyproject.toml or constraints.txt
has changed. An interrupted installation is repaired by the next run.

CONFIG is looked up from where you are; relative paths in section.key=value start at this folder. Quote a value that
holds spaces or brackets: ./launch.sh configs/pocket.toml "data.sources=[{path='my clips'}]"

Training uses every visible NVIDIA GPU (CUDA_VISIBLE_DEVICES chooses), or the CPU where there is none. For FSDP2 or
DeepSpeed on this machine's GPUs name one of accelerate's configurations:
  ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml ./launch.sh CONFIG [section.key=value ...]
For several machines use accelerate's own command, after a first run here; docs/engines.md says more:
  .venv/bin/accelerate launch --config_file configs/accelerate/X.yaml -m train --config CONFIG [section.key=value ...]

SIGINT (Ctrl-C), SIGTERM and SIGUSR1 stop a training at the next step, with a checkpoint, and exit 143; the same
command resumes it. Exit 2: this machine cannot run it, or the arguments are wrong.
EOF
}

say() { printf 'launch.sh: %s\n' "$*" >&2; }

fail() { # STATUS MESSAGE
    say "$2"
    exit "$1"
}

# ---------------------------------------------------------------------------------------------------------------------
# Children. Bash holds a trapped signal back until its foreground command ends, so what takes long runs in the
# background and is waited for. It gets its own process group, or a terminal's Ctrl-C would reach it beside bash; Python
# makes the group, because `set -m` stops a script that was started in the background and macOS has no setsid. Bash lets
# background commands ignore SIGINT, which would be inherited: it is given back.
own_group='import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setpgrp()
os.execvp(sys.argv[1], sys.argv[1:])'
python=.venv/bin/python
child=''

run() { # COMMAND...: runs it to its end; call as `run ... || ...`
    local status=0
    "$python" -c "$own_group" "$@" </dev/null &
    child=$!
    wait "$child" || status=$?
    child=''
    return "$status"
}

abort_installation() { # SIGNAL
    trap '' HUP INT TERM USR1
    if [[ -n $child ]]; then
        kill -TERM -- "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    fail $((128 + $(kill -l "$1"))) "stopped by SIG$1 while installing; the next run repairs what is unfinished"
}

on_signals() { # HANDLER: called with the signal's name
    local name
    for name in HUP INT TERM USR1; do
        # shellcheck disable=SC2064 # the names are meant to expand now
        trap "$1 $name" "$name"
    done
}

# ---------------------------------------------------------------------------------------------------------------------
# Installation
supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'

find_python() { # constraints.txt was tried on 3.11, so that comes first
    local name seen=''
    for name in python3.11 python3.12 python3.13 python3 python; do
        # A version manager's shim can exist and not run: only an answer counts.
        if "$name" -c "$supported" >/dev/null 2>&1; then
            python=$(command -v "$name")
            return
        fi
        if command -v "$name" >/dev/null; then
            seen+=" $name is $("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo broken);"
        fi
    done
    fail 2 "needs Python 3.11, 3.12 or 3.13 on PATH;${seen:- found none;} install one and run this again"
}

nvidia_gpu_count() {
    local count=0
    count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || count=0
    if ((count > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        local -a visible=()
        IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
        count=${#visible[@]}
        [[ $CUDA_VISIBLE_DEVICES != -1 ]] || count=0
    fi
    echo "$count"
}

require_disk() {
    local need_gib=4 free_kib
    # torch's CUDA build and the libraries it brings
    if nvidia-smi -L >/dev/null 2>&1; then need_gib=12; fi
    free_kib=$(df -Pk . | { read -r _ && read -r _ _ _ free _ && echo "$free"; })
    if ((free_kib < need_gib * 1024 * 1024)); then
        fail 2 "a first installation needs about $need_gib GiB, $PWD has $((free_kib / 1024)) MiB free; make room there"
    fi
}

fingerprint() { # EXTRAS: of all that decides what is installed; the folder too, an editable install points at it
    { printf '%s\n' "$PWD" "$1" && cat pyproject.toml constraints.txt; } | cksum
}

installed() { # EXTRAS
    local stamp=".venv/installed-$1"
    [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$(fingerprint "$1")" ]]
}

pip_install() { # WHAT PIP-ARGUMENTS...
    local what=$1 status=0
    shift
    say "installing $what (once; takes minutes)"
    run .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt "$@" || status=$?
    if ((status == 0)); then return; fi
    # pip undoes what fails under its own control; a pip that was killed leaves files behind, and the mark with them.
    if ((status < 128)); then rm -f .venv/unfinished; fi
    fail 1 "pip could not install $what (its message is above); mend that and run this again"
}

install() { # EXTRAS
    if installed "$1"; then return; fi
    on_signals abort_installation
    find_python
    # flock through Python (macOS has no flock command). The lock stays with descriptor 9, which pip inherits.
    exec 9>.venv.lock
    if ! "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
        say "waiting for another launch.sh that is installing here"
        run "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || fail 1 "cannot lock .venv.lock"
    fi
    if ! installed "$1"; then install_locked "$1"; fi
    exec 9>&-
    python=.venv/bin/python
    trap - HUP INT TERM USR1
}

install_locked() { # EXTRAS
    if ! compgen -G '.venv/installed-*' >/dev/null; then require_disk; fi
    if [[ -e .venv/unfinished ]] || ! .venv/bin/python -c "$supported" 2>/dev/null ||
        ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "making .venv with $python"
        run "$python" -m venv --clear .venv ||
            fail 2 "$python cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)"
    fi
    rm -f ".venv/installed-$1"
    : >.venv/unfinished
    # torch first: its build (the CPU's or CUDA's) must be settled before anything that depends on it is resolved.
    pip_install torch torch
    pip_install "wan-finetune[$1]" -e ".[$1]"
    fingerprint "$1" >".venv/installed-$1"
    # The tests' environment is also one to train in.
    if [[ $1 == train,test ]]; then fingerprint train >.venv/installed-train; fi
    rm -f .venv/unfinished
}

install_browser() { # for the tests that look at a page, with a font for Chinese prompts
    local name packages="chromium fonts-wqy-zenhei" remedy
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    remedy="no Chromium on PATH, so the browser tests will fail; install it and a Chinese font (Debian: apt-get install $packages)"
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        say "$remedy"
        return
    fi
    say "installing $packages for the browser tests (once)"
    on_signals abort_installation
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # two packages
    if ! { run apt-get update -qq && run apt-get install -qq -y --no-install-recommends $packages; } >&2; then
        say "$remedy"
    fi
    trap - HUP INT TERM USR1
}

# ---------------------------------------------------------------------------------------------------------------------
# Training
train_in_one_process() { # cpu|gpu TRAINER-ARGUMENTS...
    # `accelerate launch` for one process sets variables, starts the trainer as its child and waits. A SIGTERM ends that
    # parent alone: the trainer goes on, orphaned, and its exit status is lost (accelerate returns 1). So the same
    # variables are set here and the trainer takes this process's place: the pid that a user or a scheduler signals is
    # the trainer's, and its exit status is this command's. accelerate's OMP_NUM_THREADS=1 and KMP_AFFINITY are left
    # out (the first slows decoding, the second pins two trainings to the same cores), and so is a default_config.yaml
    # of the user, which describes other jobs.
    local use_cpu=False
    if [[ $1 == cpu ]]; then use_cpu=True; fi
    shift
    # "no": precision is the configuration's to say, part by part.
    export ACCELERATE_USE_CPU=$use_cpu ACCELERATE_MIXED_PRECISION=no ACCELERATE_DYNAMO_BACKEND=NO
    export ACCELERATE_DYNAMO_MODE=default ACCELERATE_DYNAMO_USE_FULLGRAPH=False ACCELERATE_DYNAMO_USE_DYNAMIC=False
    export ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=False
    exec .venv/bin/python -m train "$@"
}

signals_passed=0
pass_on() { # SIGNAL
    # Once: a second signal would end the launcher while it waits for the checkpoint, and orphan the processes.
    signals_passed=$((signals_passed + 1))
    if ((signals_passed == 1)); then
        say "SIG$1: waiting for the processes to stop"
        kill -s "$1" "$child" 2>/dev/null || true
    else
        say "SIG$1 again; the processes are still stopping"
    fi
}

train_in_processes() { # COUNT TRAINER-ARGUMENTS...; ACCELERATE_CONFIG may name a file
    # Here accelerate runs torchrun's agent in its own process. The agent passes signals on to every rank and waits, but
    # takes SIGUSR1 only when told to, kills after 30 s, which can be within one step of a large model, and then ends
    # with 1 whatever the ranks returned. So bash stays, passes one signal on, and gives the ranks' own status: they
    # write it, one after the other, into a file.
    local count=$1 status=0
    # All that a default_config.yaml of the user could decide is said here; port 0 is any free one.
    local -a engine=(--multi_gpu --gpu_ids all --main_process_port 0 --mixed_precision no --dynamo_backend no)
    if [[ -n ${ACCELERATE_CONFIG-} ]]; then engine=(--config_file "$ACCELERATE_CONFIG"); fi
    shift
    export WAN_FINETUNE_STATUSES=$PWD/.venv/statuses-$$
    rm -f "$WAN_FINETUNE_STATUSES"
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=600
    on_signals pass_on
    # The script is given to Python by name: its first line holds the folder in which .venv was made.
    .venv/bin/python -c "$own_group" .venv/bin/python .venv/bin/accelerate launch "${engine[@]}" \
        --num_processes "$count" --num_machines 1 -m train "$@" </dev/null &
    child=$!
    # A trapped signal interrupts `wait`; the last one, of a process that is gone, tells the status that bash kept.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || status=$?
    if ((status != 0)); then status=$(status_of_ranks "$count" "$status"); fi
    rm -f "$WAN_FINETUNE_STATUSES"
    exit "$status"
}

status_of_ranks() { # COUNT STATUS: how the trainers ended, where the launcher itself ended with STATUS
    local end ended=0 reason=''
    if [[ -f $WAN_FINETUNE_STATUSES ]]; then
        while read -r end; do
            ended=$((ended + 1))
            if [[ -z $reason && $end != 0 ]]; then reason=$end; fi
        done <"$WAN_FINETUNE_STATUSES"
    fi
    # The first to fail has the reason; others end because of it, or were done before. One that says nothing was killed.
    if ((signals_passed > 0)); then
        case $reason in 2 | 3) echo "$reason" ;; *) echo 143 ;; esac
    elif ((ended == $1)) && [[ -n $reason ]]; then
        echo "$reason"
    else
        echo "$2"
    fi
}

train() { # [CONFIG] [section.key=value ...]
    local config=configs/pocket.toml count
    if (($# > 0)) && [[ ! $1 =~ ^[A-Za-z_][A-Za-z0-9_.]*= ]]; then
        config=$1
        shift
        if [[ $config == -* ]]; then fail 2 "unknown option $config; see ./launch.sh --help"; fi
        if [[ $config != /* && $caller_folder != "$PWD" ]]; then config=$caller_folder/$config; fi
    fi
    if [[ ! -f $config ]]; then fail 2 "no configuration $config; configs/ holds some to start from"; fi
    if [[ -n ${ACCELERATE_CONFIG-} ]]; then
        if [[ $ACCELERATE_CONFIG != /* && $caller_folder != "$PWD" ]]; then
            ACCELERATE_CONFIG=$caller_folder/$ACCELERATE_CONFIG
        fi
        if [[ ! -f $ACCELERATE_CONFIG ]]; then fail 2 "ACCELERATE_CONFIG: there is no $ACCELERATE_CONFIG"; fi
        count=$(nvidia_gpu_count)
        if ((count == 0)); then fail 2 "ACCELERATE_CONFIG is for GPUs, and nvidia-smi lists none"; fi
        install train
        say "training $config on $count GPUs as $ACCELERATE_CONFIG says"
        train_in_processes "$count" --config "$config" "$@"
    fi
    install train
    count=$(nvidia_gpu_count)
    if ((count > 1)); then
        say "training $config on $count GPUs"
        train_in_processes "$count" --config "$config" "$@"
    elif ((count == 1)); then
        say "training $config on one GPU"
        train_in_one_process gpu --config "$config" "$@"
    else
        say "training $config on the CPU"
        train_in_one_process cpu --config "$config" "$@"
    fi
}

case ${1-} in
-h | --help) usage ;;
test)
    shift
    install train,test
    install_browser
    # The whole of it on every core, a file at a time; arguments go to pytest as they are.
    (($#)) || set -- --numprocesses logical --maxprocesses 4 --dist loadfile
    exec .venv/bin/python -m pytest "$@"
    ;;
*) train "$@" ;;
esac
