#!/bin/sh
# Both models and the comparison of variants on one GPU, side by side: all.sh FOLDER OUTPUT SECONDS WRITE [BATCH]
# FOLDER holds smol/ and coder/ as prepare.py wrote them, with tokenizer.json in coder/.
cd "$(dirname "$0")" || exit
in=$1 out=$2 seconds=$3 write=$4 batch=${5:-1024} python=${PYTHON:-python3}
start=../../mlx_redrafter/drafters/smollm2-135m-instruct/model.safetensors
export PYTHONUNBUFFERED=1
rm -f "$in"/*.npz
$python run.py "$in/smol" "$out" --name smol --seconds "$seconds" --write "$write" --batch "$batch" \
    --layers 8 16 23 --exit 576 --start $start --rows "$in/smol.npz" > "$out/smol.log" 2>&1 &
$python run.py "$in/coder" "$out" --name coder --seconds "$seconds" --write "$write" --batch "$batch" \
    --layers 8 14 20 --exit 768 --vocabulary 8192 --tokenizer "$in/coder/tokenizer.json" --rows "$in/coder.npz" \
    > "$out/coder.log" 2>&1 &
$python run.py "$in/smol" "$out" --name modes --seconds "$seconds" --layers 8 16 23 --exit 576 --start $start \
    --rows "$in/smol.npz" --modes none once depth depth+lk --tokens 16384 --steps 800 > "$out/modes.log" 2>&1 &
wait
tail -n 30 "$out"/*.log
