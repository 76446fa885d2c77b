# What the launch scripts beside this file have in common; they source it. It starts torchrun, passes a request to stop on to the
# ranks, waits until they have saved, and turns the outcome of the run into an exit code.
#
# torchrun alone does not do: it turns every exit code into 1, does not pass on SIGUSR1, kills ranks 30 seconds after a signal
# (older than 2.12: whatever one sets), and may start ranks anew that a signal has stopped.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
first=""          # signal that asked to stop
latest=0          # when, in microseconds
urgent=""         # when a second request came, in seconds since the start
ending=""         # the ranks know of the second request
torchrun=0        # its process
declare -A told=()  # ranks that have been asked to stop

find_python() {
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        if [[ -n ${VIRTUAL_ENV:-} ]]; then PYTHON=$VIRTUAL_ENV/bin/python
        elif [[ -x $here/../.venv/bin/python ]]; then PYTHON=$here/../.venv/bin/python; fi
    fi
    if ! "$PYTHON" -c 'import megatron_llm' 2>/dev/null; then
        export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # a checkout that is not installed
    fi
}

default_ranks() { # as many as there are GPUs, or 1
    local gpus
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    echo $((gpus > 0 ? gpus : 1))
}

# The rules of the ranks themselves: what comes within a second is the same request, passed on twice; SIGTERM after SIGUSR1 is
# SLURM's limit after its warning; anything else is a second request.
on_signal() { # name
    local now=${EPOCHREALTIME/[.,]/}
    if ((now - latest < 1000000)); then return; fi
    latest=$now
    if [[ -z $first || ($first == USR1 && $1 != USR1) ]]; then first=$1; else urgent=$SECONDS; fi
}

ranks() { # processes that torchrun has started
    local file line fields
    for file in /proc/[0-9]*/stat; do
        { read -r line <"$file"; } 2>/dev/null || continue # it has ended
        read -ra fields <<<"${line##*) }"
        if [[ ${fields[1]:-} == "$torchrun" ]]; then file=${file#/proc/} && echo "${file%/stat}"; fi
    done
}

listens() { # whether a process has a handler of SIGUSR1, as ranks have that are past their start
    local name mask
    while read -r name mask; do
        if [[ $name == SigCgt: ]]; then
            return $((!((16#$mask >> ($(kill -l USR1) - 1)) & 1)))
        fi
    done 2>/dev/null <"/proc/$1/status"
    return 1
}

pass_on() {
    local rank
    if [[ -n $urgent && -z $ending ]]; then
        ending=yes
        for rank in "${!told[@]}"; do kill -USR1 "$rank" 2>/dev/null || true; done
        kill -TERM "$torchrun" 2>/dev/null || true
    elif [[ -n $urgent ]]; then
        if ((SECONDS - urgent < 5)); then return; fi # to end by themselves
        for rank in $(ranks); do kill -KILL "$rank" 2>/dev/null || true; done
        kill -TERM "$torchrun" 2>/dev/null || true
    elif [[ -n $first ]]; then
        for rank in $(ranks); do
            if [[ -z ${told[$rank]:-} ]] && listens "$rank"; then
                told[$rank]=yes
                kill -USR1 "$rank" 2>/dev/null || true
            fi
        done
    fi
}

identity() { # of a file: another one if it has been written anew
    stat -c '%i %y' "$1" 2>/dev/null || true
}

# Run to the end and exit: 0 done, 75 stopped (saved: run the same command again), 1 failed.
launch() { # torchrun's options -- CONFIG.yaml files and overrides
    local options=() settings=() word status before outcome run_dir
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    trap 'on_signal TERM' TERM HUP
    trap 'on_signal INT' INT
    trap 'on_signal USR1' USR1
    find_python
    for word in "$@"; do # without --allow-change, which is for `train`
        if [[ $word != --* ]]; then settings+=("$word"); fi
    done
    # Wrong settings end here, once and not once a restart.
    run_dir=$("$PYTHON" -m megatron_llm config show "${settings[@]}" |
        "$PYTHON" -c 'import sys, yaml; print((yaml.safe_load(sys.stdin) or {"logging": {"run_dir": ""}})["logging"]["run_dir"])') || exit 1
    if [[ -n $first ]]; then exit 75; fi
    status=$run_dir/status.json
    before=$(identity "$status")
    # In a session of its own no signal to this script's group or terminal reaches torchrun. Some batch systems signal every
    # process: torchrun must survive SIGUSR1, and SIGTERM must leave the ranks their time.
    (
        trap '' USR1
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_SECONDS:-3600}"
        exec setsid "$PYTHON" -m torch.distributed.run "${options[@]}" -m megatron_llm train "$@"
    ) &
    torchrun=$!
    while kill -0 "$torchrun" 2>/dev/null; do
        pass_on
        sleep 1 &
        wait $! || true # a signal ends the wait
    done
    wait "$torchrun" || true
    if [[ $(identity "$status") == "$before" ]]; then exit 1; fi # no run of ours has begun
    outcome=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["outcome"])' "$status") || exit 1
    case $outcome in
        done) exit 0 ;;
        stopped) exit 75 ;;
        *) exit 1 ;;
    esac
}
