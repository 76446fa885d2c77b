# What the batch scripts beside this file have in common; they source it, with $examples set to the folder above.
#
# SLURM runs a copy of a batch script, from a spool folder: nothing lies beside it, and the scripts look for this file where they
# were submitted from.

source "$examples/torchrun_common.sh" # find_python, run_dir_of, listens

# In an array SLURM_JOB_ID of one task is the number of the whole array; this names the task alone.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

fail() { # message [exit code]
    echo "$(basename "$examples")/slurm: job $job: $1" >&2
    exit "${2:-1}"
}

# The line of a table that this task of an array is for, as the array `words`. Lines that are blank or begin with # do not count;
# quotes are those of a shell, and nothing else is.
words_of_line() { # FILE what-a-line-is
    local lines number=${SLURM_ARRAY_TASK_ID:-}
    [[ -f $1 ]] || fail "$1 is not a file in $PWD; name the table of $2s"
    mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$1")
    ((${#lines[@]})) || fail "$1 has no $2"
    [[ -n $number ]] || fail "this is no task of an array: submit with --array=0-$((${#lines[@]} - 1)), a task for each $2 of $1"
    ((number < ${#lines[@]})) ||
        fail "task $number of the array is outside of $1, which has ${#lines[@]} $2s: submit with --array=0-$((${#lines[@]} - 1))"
    mapfile -t words < <(xargs printf '%s\n' <<<"${lines[number]}") || true
    ((${#words[@]})) || fail "$2 $number of $1 cannot be read (an open quote?): ${lines[number]}"
}

megatron_llm() {
    echo "$ megatron-llm $*"
    "$PYTHON" -m megatron_llm "$@"
}

status_of() { # RUN key: what its status.json says, or nothing
    "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' "$1/status.json" "$2" 2>/dev/null || true
}

state_of_job() { # RUNNING Reason=None, or what ends it: COMPLETING Reason=TimeLimit
    scontrol --oneliner show job "$job" | sed -n 's/.*JobState=\([A-Z_]*\) \(Reason=[^ ]*\).*/\1 \2/p'
}

time_is_over() { # before the run has ended; SLURM kills what is left after its KillWait
    [[ $(state_of_job) == *TimeLimit ]] || return 0
    echo "the time of job $job is over, and the run has not saved yet. What it does not save within KillWait (30 seconds on most" >&2
    echo "clusters) is lost, and the job is not put back: warn earlier (--signal=B:USR1@600). The same command goes on." >&2
}

# Train on all nodes of the job and exit: 0 done, 1 failed, 75 saved but not put back into the queue. A run that was stopped, by
# SLURM's warning or by training.max_minutes, goes back into the queue as this job, and whoever waits for the job goes on waiting.
train_until_done() { # CONFIG.yaml overrides, --allow-change
    local folder asked="" told="" step run before outcome code=0
    find_python
    [[ -f $1 ]] || fail "$1 is not a file in $PWD, the folder that the job was submitted from"
    trap 'asked=yes' USR1
    trap 'time_is_over' TERM # SLURM tells the ranks as well; what they say in the end counts
    run=$(run_dir_of "$@") || fail "the settings are wrong (see above), nothing was started; mend them and submit again"
    before=$(identity "$run/status.json")
    if [[ -n $before && $(status_of "$run" outcome) != done ]]; then
        echo "$run: going on from its last checkpoint; its status was: $(cat "$run/status.json")"
    fi

    folder=$(mktemp -d)
    # The one task of a node has all ranks of it. srun would give it one core, and takes no --cpus-per-task from the job, from
    # 22.05 on.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
    # A signal goes to the launch script of this node alone. srun would signal its ranks as well, seconds apart on a busy machine,
    # and a second signal ends a rank at once.
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        bash -c 'if [[ $SLURM_NODEID == 0 ]]; then echo $$ >"$0"; fi; exec "$@"' \
        "$folder/pid" "$examples/torchrun_multi_node.sh" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        if [[ -n $asked && -z $told && -s $folder/pid ]] && listens "$(<"$folder/pid")"; then
            echo "asked to stop: the run ends its step, saves, and goes back into the queue"
            kill -USR1 "$(<"$folder/pid")" && told=yes
        fi
        sleep 1 &
        wait $! || true # a signal ends the wait
    done
    wait "$step" || code=$?
    rm -rf "$folder"

    if [[ $(identity "$run/status.json") == "$before" ]]; then
        if [[ -n $asked ]]; then
            fail "asked to stop before the run had begun: --time must be longer than a run's start and the warning of --signal" 75
        fi
        fail "no run has begun in $run (srun ended with $code; see above); mend what it says and submit again"
    fi
    outcome=$(status_of "$run" outcome)
    case $outcome in
        done) exit 0 ;;
        stopped) put_back "$run" ;;
        failed) fail "the run failed: $(status_of "$run" reason)
Steps since its last checkpoint are lost, and it was not put back into the queue. Stacks, if any, are in $run/stacks.
Mend what the reason says and submit the same command again: it goes on from that checkpoint." ;;
        *) fail "the ranks ended without a word (srun: $code; $run/status.json: '$outcome'), killed, perhaps for their memory.
Look at the log above and at: sacct -j $job --format=JobID,State,ExitCode,MaxRSS
The same command goes on from the last checkpoint." ;;
    esac
}

put_back() { # RUN
    local state said step
    state=$(state_of_job) step=$(status_of "$1" step)
    case $state in
        RUNNING*) ;;
        *TimeLimit) echo "step $step was saved when the time was over already: warn earlier (--signal=B:USR1@600)" >&2 ;;
        # scontrol would take it back even from scancel.
        *) fail "step $step is saved; the job was cancelled or ended from outside ($state) and stays so. The same command goes on from there." 75 ;;
    esac
    said=$(scontrol requeue "$job" 2>&1) ||
        fail "step $step is saved, but SLURM does not put this job back into the queue: $said
Jobs must be submitted with --requeue, and your site must allow it. The same command goes on from there; where it is not allowed,
queue the next one while a job runs: sbatch --dependency=afterany:$SLURM_JOB_ID ..." 75
    echo "step $step is saved; job $job is back in the queue and goes on from there (squeue -j $job)"
    trap 'exit 75' TERM
    sleep 60 & # SLURM ends this script
    wait $! || true
    exit 75
}
