#!/bin/sh
# Both drafters on one GPU, side by side: all.sh FOLDER OUTPUT SECONDS WRITE
# FOLDER holds smol/ and coder/ as prepare.py wrote them, each with start.safetensors, a drafter in floats, and
# tokenizer.json in coder/.
cd "$(dirname "$0")" || exit
in=$1 out=$2 python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
run() {
    name=$1 && shift
    $python run.py "$in/$name" "$out" --name "$name" --start "$in/$name/start.safetensors" "$@" > "$out/$name.log" 2>&1
}
run smol --seconds "$3" --write "$4" --layers 8 16 23 --rate 8e-4 &
run coder --seconds "$3" --write "$4" --layers 8 14 20 --batch 1536 --long-batch 0 --tokenizer "$in/coder/tokenizer.json" &
wait
tail -n 30 "$out"/*.log
