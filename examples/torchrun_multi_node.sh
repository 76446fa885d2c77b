#!/usr/bin/env bash
# Train on several machines. Run the same command on each of them; logging.run_dir must be a folder that all share.
#
#     HEAD_NODE=node1 NNODES=4 examples/torchrun_multi_node.sh CONFIG.yaml [FILE.yaml|section.key=value ...] [--allow-change]
#
# SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 to this script on any machine end the step, save and stop the run on all; a second one, more
# than three seconds later, ends this machine's ranks at once, and the others with them. Exit codes, on each machine: 0 done, 75 stopped
# after saving (run the same commands again to continue), 1 failed, 2 usage.
#
# Environment:
#   HEAD_NODE         name or address of the machine where ranks meet, the same everywhere; within a SLURM job its first node
#   NNODES            machines, or MIN:MAX: with fewer than MAX the run goes on if its layout allows it; SLURM's number of nodes
#   HEAD_PORT         29400; within a SLURM job a port of its own
#   JOB_ID            a name for this run, the same everywhere; SLURM's job, or the name of the configuration
#   NPROC_PER_NODE    ranks on this machine; as many as it has GPUs, or 1
#   MAX_RESTARTS      how often the run goes on by itself from its last checkpoint when a rank or a machine was lost; 3
#   RDZV_CONF         torchrun's --rdzv-conf, such as join_timeout=1800,last_call_timeout=60
#   SHUTDOWN_SECONDS  for saving, where a batch system signals torchrun itself; 3600, from torch 2.12 on
#   PYTHON            interpreter; that of the active virtual environment, of the checkout, or python3
#
# The machine HEAD_NODE holds what the others meet in: the run survives the loss of any machine but that one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun_common.sh"

NNODES=${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_JOB_NUM_NODES:-}}}
nodes=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}
if [[ -z ${HEAD_NODE:-} && -n $nodes ]]; then
    HEAD_NODE=$(scontrol show hostnames "$nodes" | sed -n 1p)
    # Who holds the rendezvous is otherwise told by comparing names, which fails where a node has several.
    if [[ -n ${SLURM_STEP_ID:-} ]]; then
        RDZV_CONF=is_host=$([[ $SLURM_NODEID == 0 ]] && echo true || echo false)${RDZV_CONF:+,$RDZV_CONF}
    fi
fi
if [[ -n ${SLURM_JOB_ID:-} ]]; then # jobs may share a node; plain srun computes alike (megatron_llm/training/launcher.py)
    HEAD_PORT=${HEAD_PORT:-$((20000 + (16 * SLURM_JOB_ID + ${SLURM_STEP_ID:-0}) % 12000))}
fi
if [[ $# -lt 1 || $1 == -* || -z ${HEAD_NODE:-} || -z $NNODES ]]; then
    echo "usage: HEAD_NODE=host NNODES=number $0 CONFIG.yaml [FILE.yaml|section.key=value ...]   (on each of the machines)" >&2
    exit 2
fi
find_python
# Ranks meet on the network on which HEAD_NODE is reached, whatever names mean and whichever other networks there are.
read -r own head < <("$PYTHON" -c '
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
    way.connect((sys.argv[1], 9))
    print(way.getsockname()[0], way.getpeername()[0])' "$HEAD_NODE" 2>/dev/null) || own=127.0.0.1
address=()
if [[ $own != 127.* ]]; then
    address=(--local-addr "$own")
    if [[ $own == "$head" ]]; then HEAD_NODE=localhost; fi # so torchrun knows that it is the one that holds the store
fi
# torchrun gives up on machines that do not come, or do not answer; if it cannot, `launch` ends it.
meeting=10 # to start
for wait in join_timeout=600 last_call_timeout=30 read_timeout=60; do
    if [[ ,${RDZV_CONF:-}, =~ ,${wait%=*}=([0-9]+), ]]; then wait=${wait%=*}=${BASH_REMATCH[1]}; fi
    meeting=$((meeting + ${wait#*=}))
done
# A store of the ranks' own, made anew at each start: what the agents keep of a node that left does not matter to the ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-$(default_ranks)}" --max-restarts "${MAX_RESTARTS:-3}" \
    "${address[@]}" --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:${HEAD_PORT:-29400}" --rdzv-id "${JOB_ID:-${SLURM_JOB_ID:-$(basename "$1")}}" \
    ${RDZV_CONF:+--rdzv-conf "$RDZV_CONF"} -- "$@"
