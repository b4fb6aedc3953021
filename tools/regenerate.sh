#!/bin/sh
# Regenerates tests/checkpoints/: `tools/regenerate.sh fixtures`, `stories` or `all`.
# PYTHON is an interpreter with tools/fixtures/requirements.txt installed. Training the stories wants a GPU; models that
# are already in target/stories/ are used as they are.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
part=${1:-fixtures}

stories() {
    for model in llama qwen3-moe; do
        if [ ! -d "target/stories/$model-bf16" ]; then
            "$python" tools/stories/train.py --model "$model" --out "target/stories/$model-bf16"
        fi
    done
    "$python" tools/stories/quantize.py --models target/stories --out tests/checkpoints
    "$python" tools/stories/reference.py --models target/stories --checkpoints tests/checkpoints
    # activation modes and greedy text, on the ids and prompts that are stored beside them
    for folder in tests/checkpoints/stories-*; do
        "$python" tools/fixtures/reference.py "$folder" --short "$folder/heldout.ids"
    done
}

fixtures() {
    "$python" tools/fixtures/build.py
    "$python" tools/fixtures/check.py
}

case $part in
fixtures) fixtures ;;
stories) stories ;;
all) stories && fixtures ;;
*) echo "usage: tools/regenerate.sh [fixtures|stories|all]" >&2 && exit 2 ;;
esac
