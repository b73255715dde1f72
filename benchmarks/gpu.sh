#!/bin/sh
# All figures that need a GPU, one after another:
#
#     benchmarks/gpu.sh [folder]      numbers as JSON, tables as text; default: runs/gpu
#     benchmarks/gpu.sh --dry [folder]      the same commands in their smallest form on the CPU, to see that they run
#
# PYTHON names the interpreter, MODEL the CLIP of the stream (default: openai/clip-vit-base-patch16).
set -eu
cd "$(dirname "$0")/.."
dry=
if [ "${1:-}" = --dry ]; then
    dry=1
    shift
fi
folder=${1:-runs/gpu}
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$folder"

# The command, what it is called, and then what it is told on a GPU; in a dry run it is told --quick alone.
measure() {
    name=$1 script=$2
    shift 2
    if [ -n "$dry" ]; then
        set -- --quick --device cpu
    fi
    echo "== $name: $script $*"
    "$python" "benchmarks/$script" "$@" --output "$folder/$name.json" > "$folder/$name.txt"  # no pipe, which would hide a failure
    cat "$folder/$name.txt"
}

if [ -z "$dry" ]; then
    "$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' > "$folder/device.txt"
    cat "$folder/device.txt"
fi
measure step_time step_time.py --device cuda
measure pool_step_time pool_step_time.py --device cuda
measure selection_cost selection_cost.py --device cuda
measure serving serving.py --device cuda --model vit-b/16
measure wemoe_forward wemoe_forward.py --device cuda
measure input_cost input_cost.py --device cuda --model "${MODEL:-openai/clip-vit-base-patch16}"

# The stream itself, in each precision: seconds and accuracies are in its results.json. fp16 takes a gradient scaler, which
# Accelerate has on GPUs alone.
for precision in no bf16 fp16; do
    if [ -n "$dry" ]; then
        [ "$precision" = fp16 ] && continue
        set -- --suite digits --steps 2 --batch_size 8 --methods moe_lora_pool --cpu
    else
        set -- --suite mini --methods moe_lora_pool moe_lora_merge lora --num_workers 4
    fi
    echo "== stream, $precision: examples/mtil.py $*"
    "$python" examples/mtil.py "$@" --mixed_precision "$precision" --output_dir "$folder/stream_$precision"
done
echo "== all of it is in $folder"
