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
meeting=0         # seconds that torchrun may be without ranks, as it waits for other machines; 0: any number
alone=""          # since when it has none, in seconds since the start
declare -A told=()  # ranks that have been asked to stop
told_at=0         # when the last of them was, in microseconds

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

default_ranks() { # as many as there are GPUs, or 1; within a SLURM job, those that it has of this machine
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    if ((!gpus)); then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
    echo $((gpus > 0 ? gpus : 1))
}

run_dir_of() { # CONFIG.yaml files and overrides: the folder of the run; fails, having said why, if the settings are wrong
    local settings=() word
    for word in "$@"; do # without --allow-change, which is for `train`
        if [[ $word != --* ]]; then settings+=("$word"); fi
    done
    trap '' USR1 # a request to stop is the script's; in the subshell of $(...)
    "$PYTHON" -m megatron_llm config show "${settings[@]}" |
        "$PYTHON" -c 'import sys, yaml; print((yaml.safe_load(sys.stdin) or {"logging": {"run_dir": ""}})["logging"]["run_dir"])'
}

# The rules of the ranks themselves: what comes within three seconds is the same request, passed on twice; SIGTERM after
# SIGUSR1 is SLURM's limit after its warning; anything else is a second request.
on_signal() { # name
    local now=${EPOCHREALTIME/[.,]/}
    if ((now - latest < 3000000)); then return; fi
    latest=$now
    if [[ -z $first || ($first == USR1 && $1 != USR1) ]]; then first=$1; else urgent=$SECONDS; fi
}

ranks() { # processes that torchrun has started
    local file line fields
    for file in /proc/[0-9]*/stat; do
        { read -r line <"$file"; } 2>/dev/null || continue # it has ended
        read -ra fields <<<"${line##*) }"
        if [[ ${fields[1]:-} == "$torchrun" && ${fields[0]} != Z ]]; then file=${file#/proc/} && echo "${file%/stat}"; fi
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
    if [[ -n $first && -z $ending ]]; then
        for rank in $(ranks); do
            if [[ -z ${told[$rank]:-} ]] && listens "$rank"; then
                told[$rank]=yes
                kill -USR1 "$rank" 2>/dev/null || true
                told_at=${EPOCHREALTIME/[.,]/}
            fi
        done
    fi
    if [[ -n $urgent && -z $ending ]]; then
        if ((${EPOCHREALTIME/[.,]/} - told_at < 4000000)); then return; fi # or they would take it for the same request
        ending=yes
        urgent=$SECONDS
        for rank in "${!told[@]}"; do kill -USR1 "$rank" 2>/dev/null || true; done
        kill -TERM "$torchrun" 2>/dev/null || true
    elif [[ -n $ending ]]; then
        if ((SECONDS - urgent < 5)); then return; fi # to end by themselves
        for rank in $(ranks); do kill -KILL "$rank" 2>/dev/null || true; done
        if ((SECONDS - urgent < 10)); then kill -TERM "$torchrun" 2>/dev/null || true; else kill -KILL "$torchrun" 2>/dev/null || true; fi
    fi
}

# A torchrun whose connection to the other machines is dead may wait for an answer for ever, and hears no signal meanwhile.
end_if_stuck() {
    if ((meeting == 0 || SECONDS % 5)); then return; fi # to look through all processes takes a while
    if [[ -n $(ranks) ]]; then alone="" && return; fi
    alone=${alone:-$SECONDS}
    if ((SECONDS - alone > meeting)); then
        echo "torchrun has had no ranks for $meeting seconds and is ended: it waits for other machines that it cannot reach" >&2
        kill -KILL "$torchrun" 2>/dev/null || true
    fi
}

identity() { # of a file: another one if it has been written anew; its file system may be lost with the network
    timeout -s KILL 30 stat -c '%i %y' "$1" 2>/dev/null || true
}

# Run to the end and exit: 0 done, 75 stopped (saved: run the same command again), 1 failed.
launch() { # torchrun's options -- CONFIG.yaml files and overrides
    local options=() status before outcome reason run_dir
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    trap 'on_signal TERM' TERM HUP
    trap 'on_signal INT' INT
    trap 'on_signal USR1' USR1
    find_python
    run_dir=$(run_dir_of "$@") || exit 1 # wrong settings end here, once and not once a restart
    # Asked to stop by now: the ranks hear of it when they listen. To end here would leave other machines waiting for this one.
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
        end_if_stuck
        sleep 1 &
        wait $! || true # a signal ends the wait
    done
    wait "$torchrun" 2>/dev/null || true
    if [[ $(identity "$status") == "$before" ]]; then exit 1; fi # no run of ours has begun
    { read -r outcome && read -r reason; } < <(timeout -s KILL 30 "$PYTHON" -c '
import json, sys
status = json.load(open(sys.argv[1]))
print(status["outcome"], status.get("reason", "a rank or a machine was lost").replace("\n", " "), sep="\n")' "$status") || exit 1
    case $outcome in
        done) exit 0 ;;
        stopped) exit 75 ;;
    esac
    echo "the run has failed: $reason" >&2
    echo "When this is mended, the same command (on each machine) goes on from the last checkpoint of $run_dir." >&2
    exit 1
}
