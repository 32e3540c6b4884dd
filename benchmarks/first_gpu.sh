#!/bin/sh
# What a GPU is asked first, the quick things before the long ones; each goes on if one before it failed.
#   sh benchmarks/first_gpu.sh FOLDER      logs and results go to FOLDER
out=${1:?a folder for the results}
mkdir -p "$out"
part() { name=$1; limit=$2; shift 2; timeout "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null; echo "$name: exit $?"; tail -n 12 "$out/$name.log"; }
part oracle 60 python3 benchmarks/cuda_oracle.py
part train 90 python3 -m ttt_cli train --backbone moshi --set train.device=cuda --set train.max_steps=30 --set run_dir="$out/run"
part laws 170 python3 -m pytest -q -x -p no:cacheprovider tests/test_laws.py -k Cuda
part moshi_7b 150 python3 benchmarks/moshi_7b.py --repeats 3 --warmup 1 --score-batch-sizes 1 8 --pieces 64 --out "$out/moshi_7b-cuda.json"
part scan 100 python3 benchmarks/scan.py --device cuda --quick
