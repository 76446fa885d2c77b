#!/usr/bin/env bash
# Continue the pretraining of an open model on your text, then tune it on your conversations, then export it.
#
#     examples/continue_then_sft/run.sh --hf DIR --text FILE --text-valid FILE --chat FILE --chat-valid FILE --out DIR
#         [--template NAME] [--lora] [[continue:|sft:]section.key=value ...]
#
#   --hf          Hugging Face folder of the model, with its tokenizer
#   --text        what it reads on: jsonl, parquet, txt ...; --text-valid: held out
#   --chat        conversations in any format of docs/data.md; --chat-valid: held out
#   --template    for a base model without a chat template: chatml, llama3, ... (docs/data.md lists them)
#   --lora        tune adapters instead of all weights
#   --out         everything is made there. Run the same command again after an interruption: what is done is not done again
#
# Settings go to both phases, or to one: training.steps=100, sft:data.overlong=drop, continue:optimizer.lr=1.0e-5. The recipe itself is
# continue.yaml and sft.yaml beside this script. Training runs on all GPUs, or NPROC_PER_NODE ranks, with
# examples/torchrun_single_node.sh, whose signals and exit codes these are: 75 is stopped after saving.
set -euo pipefail

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() {
    sed -n '4,5p' "${BASH_SOURCE[0]}" | cut -c3- >&2
    if [[ -n ${1:-} ]]; then echo "$1" >&2; fi
    exit 2
}

declare -A given=()
phases=() continued=() tuned=() lora=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --hf | --text | --text-valid | --chat | --chat-valid | --out | --template)
            [[ $# -gt 1 ]] || usage "$1 needs a value"
            given[$1]=$2 && shift 2 ;;
        --lora) lora=(peft.kind=lora optimizer.lr=2.0e-4) && shift ;;
        continue:*.*=*) continued+=("${1#continue:}") && shift ;;
        sft:*.*=*) tuned+=("${1#sft:}") && shift ;;
        *.*=*) phases+=("$1") && shift ;;
        *) usage "unknown: $1" ;;
    esac
done
for option in --hf --text --text-valid --chat --chat-valid --out; do
    [[ -n ${given[$option]:-} ]] || usage "$option is missing"
    [[ $option == --out || -e ${given[$option]} ]] || usage "$option: ${given[$option]} does not exist"
done
absolute() { cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"; }
for option in --hf --text --text-valid --chat --chat-valid; do given[$option]=$(absolute "${given[$option]}"); done
mkdir -p "${given[--out]}/data"
cd "${given[--out]}"

source "$recipe/../torchrun_common.sh"
find_python
megatron_llm() {
    echo "$ megatron-llm $*"
    "$PYTHON" -m megatron_llm "$@"
}
train() { # CONFIG.yaml overrides; ends the script when the run is stopped or fails. A signal to this script alone reaches the run, too
    local run status
    echo "$ torchrun -m megatron_llm train $*"
    "$recipe/../torchrun_single_node.sh" "$@" &
    run=$!
    trap 'kill -TERM $run 2>/dev/null || true' TERM HUP INT # a process in the background has SIGINT ignored
    trap 'kill -USR1 $run 2>/dev/null || true' USR1
    while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a signal ends the wait
    trap - TERM HUP INT USR1
    wait "$run" && status=0 || status=$?
    if ((status)); then exit "$status"; fi
}

# Conversations first: they may make the tokenizer that everything is read with.
tokenizer=${given[--hf]} chat=() resize=()
number() { "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["vocab_size"])' "$1"; }
if [[ -n ${given[--template]:-} ]]; then
    chat=(--template "${given[--template]}" --save-tokenizer tokenizer)
    tokenizer=tokenizer
fi
megatron_llm preprocess-chat --input "${given[--chat]}" --tokenizer "${given[--hf]}" --output data/chat "${chat[@]}"
megatron_llm preprocess-chat --input "${given[--chat-valid]}" --tokenizer "$tokenizer" --output data/chat_valid
megatron_llm preprocess --input "${given[--text]}" --tokenizer "$tokenizer" --output data/text
megatron_llm preprocess --input "${given[--text-valid]}" --tokenizer "$tokenizer" --output data/text_valid

tokens=$(number data/chat.meta.json)
if ((tokens > $(number "${given[--hf]}/config.json"))); then resize=("model.resize_vocab=$tokens"); fi # the template's own
# The rows of new tokens begin alike. Frozen, they would stay so, and the model could not tell the end of a reply from the start of one.
if [[ -n ${given[--template]:-} && ${#lora[@]} -gt 0 ]]; then
    lora+=('optimizer.rules=[{match: "[eh]*.weight", frozen: false}]') # embedding.weight, and head.weight where it is another
fi
train "$recipe/continue.yaml" "model.hf=${given[--hf]}" "data.tokenizer=$tokenizer" "${resize[@]}" "${phases[@]}" "${continued[@]}"
train "$recipe/sft.yaml" "data.tokenizer=$tokenizer" "${lora[@]}" "${phases[@]}" "${tuned[@]}"

[[ -e hf ]] || megatron_llm export tuned hf --ema
megatron_llm generate --hf hf --chat --prompt "Hello! What can you do?" --max-new-tokens 64
echo "done: $PWD/hf loads in transformers; talk to it with: megatron-llm chat --hf $PWD/hf"
