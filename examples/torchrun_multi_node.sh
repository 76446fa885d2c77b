#!/usr/bin/env bash
# Train on several machines. Run the same command on each of them; logging.run_dir must be a folder that all share.
#
#     HEAD_NODE=node1 NNODES=4 examples/torchrun_multi_node.sh CONFIG.yaml [FILE.yaml|section.key=value ...] [--allow-change]
#
# SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 to this script on any machine end the step, save and stop the run on all; a second one, more
# than a second later, ends this machine's ranks at once, and the others with them. Exit codes, on each machine: 0 done, 75 stopped
# after saving (run the same commands again to continue), 1 failed, 2 usage.
#
# Environment:
#   HEAD_NODE         name or address of the machine where ranks meet, the same everywhere; within a SLURM job its first node
#   NNODES            machines, or MIN:MAX: with fewer than MAX the run goes on if its layout allows it; SLURM's number of nodes
#   HEAD_PORT         29400
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

NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-}}
if [[ -z ${HEAD_NODE:-} && -n ${SLURM_JOB_NODELIST:-} ]]; then
    HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
if [[ $# -lt 1 || $1 == -* || -z ${HEAD_NODE:-} || -z $NNODES ]]; then
    echo "usage: HEAD_NODE=host NNODES=number $0 CONFIG.yaml [FILE.yaml|section.key=value ...]   (on each of the machines)" >&2
    exit 2
fi
# A store of the ranks' own, made anew at each start: what the agents keep of a node that left does not matter to the ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-$(default_ranks)}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:${HEAD_PORT:-29400}" --rdzv-id "${JOB_ID:-${SLURM_JOB_ID:-$(basename "$1")}}" \
    ${RDZV_CONF:+--rdzv-conf "$RDZV_CONF"} -- "$@"
