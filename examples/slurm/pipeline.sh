#!/usr/bin/env bash
# From an open model, your text and your conversations to a tuned, exported and evaluated model: submits all jobs at once, each
# waiting for those that it needs. Run it where sbatch works; it ends when all are in the queue.
#
#     examples/slurm/pipeline.sh --hf DIR --text FILE --text-valid FILE --chat FILE --chat-valid FILE --out DIR
#         [--template NAME] [--shards N] [--train-options OPTIONS] [--cpu-options OPTIONS] [--evaluate-options OPTIONS]
#         [--evaluate ARGUMENTS] [[continue:|sft:]section.key=value ...]
#
#   --hf          Hugging Face folder of the model, with its tokenizer
#   --text        what it reads on: jsonl, parquet, txt ...; --text-valid: held out
#   --chat        conversations in any format of docs/data.md; --chat-valid: held out
#   --out         everything is made there, on a file system that all nodes share: logs, data, continued, tuned, hf, evaluation.json
#   --template    for a base model without a chat template: chatml, llama3, ... (docs/data.md lists them)
#   --shards      jobs that tokenize the text; 8
#   --train-options, --cpu-options, --evaluate-options
#                 sbatch's options of the jobs that train, that need no GPU, and that evaluates: "--nodes=4 --partition=gpu"
#   --evaluate    arguments of `megatron-llm evaluate`: "--tasks arc_challenge:25 --limit 100"; its own preset
#
# Settings go to both phases, or to one: training.steps=100, sft:data.overlong=drop, continue:parallel.tensor_parallel=4. The
# recipe is examples/continue_then_sft. A job that fails takes those with it that wait for it; its log in OUT/logs says why. Mend
# that and run the same command again: what is done is not done again.
set -euo pipefail

slurm=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$slurm/../continue_then_sft
usage() {
    sed -n '5,7p' "${BASH_SOURCE[0]}" | cut -c3- >&2
    if [[ -n ${1:-} ]]; then echo "$1" >&2; fi
    exit 2
}

declare -A given=([--shards]=8)
continued=() tuned=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --hf | --text | --text-valid | --chat | --chat-valid | --out | --template | --shards | --train-options | --cpu-options | \
            --evaluate-options | --evaluate)
            [[ $# -gt 1 ]] || usage "$1 needs a value"
            given[$1]=$2 && shift 2 ;;
        continue:*.*=*) continued+=("${1#continue:}") && shift ;;
        sft:*.*=*) tuned+=("${1#sft:}") && shift ;;
        *.*=*) continued+=("$1") tuned+=("$1") && shift ;;
        *) usage "unknown: $1" ;;
    esac
done
for option in --hf --text --text-valid --chat --chat-valid --out; do
    [[ -n ${given[$option]:-} ]] || usage "$option is missing"
    [[ $option == --out || -e ${given[$option]} ]] || usage "$option: ${given[$option]} does not exist"
done
[[ ${given[--shards]} =~ ^[1-9][0-9]*$ ]] || usage "--shards: ${given[--shards]} is no number from 1"
command -v sbatch >/dev/null ||
    usage "sbatch is not found: run this where jobs are submitted; without SLURM: examples/continue_then_sft/run.sh"
absolute() { cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"; }
for option in --hf --text --text-valid --chat --chat-valid; do given[$option]=$(absolute "${given[$option]}"); done
mkdir -p "${given[--out]}/data" "${given[--out]}/logs"
cd "${given[--out]}"
read -ra train <<<"${given[--train-options]:-}"
read -ra cpu <<<"${given[--cpu-options]:-}"
read -ra gpu <<<"${given[--evaluate-options]:-}"
read -ra evaluation <<<"${given[--evaluate]:-}"

if [[ -s jobs.txt ]]; then
    mine=$(cut -d ' ' -f 1 jobs.txt | paste -sd ,)
    still=$(squeue --noheader --format=%A --jobs="$mine" 2>/dev/null | sort -u | paste -sd ' ') || true # long ended ones are unknown
    if [[ -n $still ]]; then
        echo "jobs of an earlier start of this pipeline are in the queue, in $PWD: wait for them, or first: scancel $still" >&2
        exit 1
    fi
fi
: >jobs.txt
give_up() {
    local ids
    ids=$(cut -d ' ' -f 1 jobs.txt | paste -sd ' ')
    if [[ -n $ids ]]; then scancel $ids || true; fi # several words
    rm -f jobs.txt
    echo "sbatch refused job '$1' (see above); those before were cancelled. Mend its options and run the same command again" >&2
    exit 1
}
submit() { # name "jobs to wait for" sbatch's options and script ...: sets `id`
    local name=$1 before=$2 wait=()
    shift 2
    if [[ -n $before ]]; then wait=("--dependency=afterok:${before// /:}" --kill-on-invalid-dep=yes); fi
    id=$(sbatch --parsable --job-name="$name" --output="$PWD/logs/%x-%j.log" "${wait[@]}" "$@") || give_up "$name"
    id=${id%%;*}
    echo "$id $name${before:+ after $before}" | tee -a jobs.txt
}
command_job() { # name "jobs to wait for" arguments of megatron-llm
    submit "$1" "$2" "${cpu[@]}" "$slurm/command.sbatch" "${@:3}"
}

# Conversations first: they may make the tokenizer that everything is read with.
tokenizer=${given[--hf]} made="" start=("model.hf=${given[--hf]}") chat=() base=""
if [[ -n ${given[--template]:-} ]]; then
    tokenizer=tokenizer start=(model.hf=null model.checkpoint=base)
    chat=(--template "${given[--template]}" --save-tokenizer tokenizer)
fi
command_job chat "" preprocess-chat --input "${given[--chat]}" --tokenizer "${given[--hf]}" --output data/chat "${chat[@]}"
chats=$id
if [[ -n ${given[--template]:-} ]]; then
    made=$id # the tokens of the template find room in the model
    command_job import "$made" import "${given[--hf]}" base --tokenizer tokenizer --resize-vocab tokenizer --overwrite
    base=$id
fi
command_job chat-valid "$made" preprocess-chat --input "${given[--chat-valid]}" --tokenizer "$tokenizer" --output data/chat_valid
chats+=" $id"
MERGE=no submit text "$made" --array="0-$((given[--shards] - 1))" "${cpu[@]}" "$slurm/preprocess_array.sbatch" \
    --input "${given[--text]}" --tokenizer "$tokenizer" --output data/text
command_job merge "$id" merge "data/text-*-of-$(printf %05d "${given[--shards]}").idx" --output data/text
texts=$id
command_job text-valid "$made" preprocess --input "${given[--text-valid]}" --tokenizer "$tokenizer" --output data/text_valid
texts+=" $id"

submit continue "$texts${base:+ $base}" "${train[@]}" "$slurm/train.sbatch" "$recipe/continue.yaml" "${start[@]}" \
    "data.tokenizer=$tokenizer" "${continued[@]}"
submit sft "$id $chats" "${train[@]}" "$slurm/train.sbatch" "$recipe/sft.yaml" "data.tokenizer=$tokenizer" "${tuned[@]}"
command_job export "$id" export tuned hf --ema --overwrite
submit evaluate "$id" --gpus-per-node=1 "${gpu[@]}" "$slurm/command.sbatch" evaluate --hf hf --output evaluation.json \
    "${evaluation[@]}"

echo "all are in the queue. Where they are: squeue -j $(cut -d ' ' -f 1 jobs.txt | paste -sd ,); what they say: $PWD/logs"
