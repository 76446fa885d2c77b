#!/usr/bin/env bash
# Train on all GPUs of this machine.
#
#     examples/torchrun_single_node.sh CONFIG.yaml [FILE.yaml|section.key=value ...] [--allow-change]
#
# SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 to this script end the step, save and stop the run; a second one, more than three seconds later,
# ends it at once. Exit codes: 0 done, 75 stopped after saving (run the same command again to continue), 1 failed, 2 usage.
#
# Environment:
#   NPROC_PER_NODE    ranks; as many as there are GPUs, or 1
#   MAX_RESTARTS      how often the run goes on by itself from its last checkpoint when a rank was lost; 3
#   SHUTDOWN_SECONDS  for saving, where a batch system signals torchrun itself; 3600, from torch 2.12 on
#   PYTHON            interpreter; that of the active virtual environment, of the checkout, or python3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun_common.sh"

if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: $0 CONFIG.yaml [FILE.yaml|section.key=value ...]" >&2
    exit 2
fi
launch --standalone --nproc-per-node "${NPROC_PER_NODE:-$(default_ranks)}" --max-restarts "${MAX_RESTARTS:-3}" -- "$@"
