#!/usr/bin/env bash
# Continue the pretraining of an open model on your text, then tune it on your conversations, then export it.
#
#     examples/continue_then_sft/run.sh --hf DIR --text FILE --text-valid FILE --chat FILE --chat-valid FILE --out DIR
#         [--template NAME] [--lora] [section.key=value ...]
#
#   --hf          Hugging Face folder of the model, with its tokenizer
#   --text        what it reads on: jsonl, parquet, txt ...; --text-valid: held out
#   --chat        conversations in any format of docs/data.md; --chat-valid: held out
#   --template    for a base model without a chat template: chatml, llama3, ... (docs/data.md lists them)
#   --lora        tune adapters instead of all weights
#   --out         everything is made there. Run the same command again after an interruption: what is done is not done again
#
# Settings after the options go to both phases; the recipe itself is continue.yaml and sft.yaml beside this script. Training runs
# on all GPUs, or NPROC_PER_NODE ranks, with examples/torchrun_single_node.sh, whose exit codes these are: 75 is stopped after saving.
set -euo pipefail

recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() {
    sed -n '4,5p' "${BASH_SOURCE[0]}" | cut -c3- >&2
    if [[ -n ${1:-} ]]; then echo "$1" >&2; fi
    exit 2
}

declare -A given=()
phases=() lora=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --hf | --text | --text-valid | --chat | --chat-valid | --out | --template)
            [[ $# -gt 1 ]] || usage "$1 needs a value"
            given[$1]=$2 && shift 2 ;;
        --lora) lora=(peft.kind=lora) && shift ;;
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
train() { # CONFIG.yaml overrides; ends the script when the run does not
    echo "$ torchrun -m megatron_llm train $*"
    "$recipe/../torchrun_single_node.sh" "$@" || exit $?
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
train "$recipe/continue.yaml" "model.hf=${given[--hf]}" "data.tokenizer=$tokenizer" "${resize[@]}" "${phases[@]}"
train "$recipe/sft.yaml" "data.tokenizer=$tokenizer" "${lora[@]}" "${phases[@]}"

[[ -e hf ]] || megatron_llm export tuned hf --ema
megatron_llm generate --hf hf --chat --prompt "Hello! What can you do?" --max-new-tokens 64
echo "done: $PWD/hf loads in transformers; talk to it with: megatron-llm chat --hf $PWD/hf"
