#!/usr/bin/env bash
# Runs what needs a GPU, the most valuable first, and packs all output into one archive: benchmarks/gpu.sh MINUTES DATA
#
# DATA holds MNIST/ and pennchar/ (data/README.md); nothing is downloaded. PYTHON names another interpreter than python3
# (with requirements-dev.txt), OUT the folder. A second call with the same OUT goes on with the rows. Nine minutes are
# enough for the first tests and numbers.
set -u
if [ $# != 2 ] || ! [ "$1" -ge 0 ] 2>/dev/null || ! [ -d "$2" ]; then
    echo "usage: $0 MINUTES DATA, whole minutes and a folder" >&2
    exit 2
fi
end=$((SECONDS + 60 * $1)) data=$(cd "$2" && pwd) python=${PYTHON:-python3} out=${OUT:-gpu-$(date +%Y%m%d-%H%M%S)}
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2> /dev/null; then
    echo "$0: $python is no program with a torch that sees a GPU; PYTHON can name another" >&2
    exit 2
fi
mkdir -p "$out/runs" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 1
closing=60                                      # seconds in which a run that is stopped saves

archive() {
    tar czf "$out.tgz" -C "$(dirname "$out")" "$(basename "$out")" && echo "all of it: $out.tgz"
}
trap archive EXIT; trap 'exit 130' INT TERM HUP

part() {                                        # SECONDS NAME COMMAND...; if it fails, the others go on
    local left=$((end - SECONDS - closing)) name=$2 began=$SECONDS how="no time was left"
    local limit=$(($1 < left ? $1 : left))
    shift 2
    if [ $limit -gt 0 ]; then
        timeout -k $closing $limit "$@" > "$out/${name//[^A-Za-z0-9]/_}.txt" 2>&1
        how="status $? after $((SECONDS - began)) s"                           # 124: its time was over
    fi
    echo "$name: $how" | tee -a "$out/summary.txt"
}
agreement() { part 60 "agreement $*" "$python" -c "import torch; from common.recurrence.triton_engine import is_right
raise SystemExit(not is_right($1, $2, '$3', 'modrelu', torch.float32, torch.device('cuda', 0), '$4'))"; }
bench() { part "$1" "benchmark ${*:2}" "$python" -m benchmarks --cuda --rounds 3 --tasks "${@:2}"; }
tests() { part "$1" "tests $2" "$python" -m pytest -q -m gpu -rfE --tb=short tests/engines/test_gpu.py -k "$2" "${@:3}"; }
row() { part 86400 "row $1 $2" "$python" -m evidence "$1" --only "$2" --seeds 400 --short --run --cuda \
    --data "$data" --save "$out/runs"; }

first="200_repetitions or cannot_end or norm_of_a_state"
part 30 environment "$python" -m torch.utils.collect_env; part 10 version git describe --always --dirty
agreement 100 512 scale ieee; agreement 10 128 scale ieee
for task in psMNIST copying; do bench 100 $task --engine triton; done
tests 90 "$first"
agreement 128 1024 scale ieee
bench 60 characters --engine triton
for task in psMNIST copying characters; do bench 120 $task --engine torch; done
tests 300 "not ($first)" -n 8
agreement 100 512 scale tf32; agreement 100 512 exponential ieee
bench 60 psMNIST --engine triton --tf32
command -v ncu > /dev/null && part 60 profile ncu --clock-control none --kernel-name "regex:^(forward|backward)$" \
    --launch-count 2 --kill yes --set full "$python" -m benchmarks --cuda --rounds 3 --tasks psMNIST --engine triton
row sMNIST "nnRNN, supplement none"; row sMNIST "nnRNN, measured none"; row language "sRNN (exponential), revision expn"
for row in "sRNN (exponential) expn" "expRNN none" "nnRNN none" "sRNN, henaff expn" "RNN-Orth, henaff none"; do
    for task in sMNIST language; do row $task "$row"; done
done
