#!/usr/bin/env bash
# Runs what needs a GPU, the most valuable first, and packs all output into one archive: benchmarks/gpu.sh MINUTES DATA
#
# DATA holds MNIST/ and pennchar/ (data/README.md); nothing is downloaded. PYTHON names another interpreter than python
# (with requirements-dev.txt), OUT the folder. A second call with the same OUT goes on with the rows. SMALL=1 tries the
# script on the CPU at tiny sizes, where the numbers mean nothing.
set -u
if [ $# != 2 ] || ! [ "$1" -ge 0 ] 2>/dev/null || ! [ -d "$2" ]; then
    echo "usage: $0 MINUTES DATA, whole minutes and a folder" >&2
    exit 2
fi
end=$((SECONDS + 60 * $1)) data=$(cd "$2" && pwd) python=${PYTHON:-python} out=${OUT:-gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out/runs" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 1
closing=60                                      # seconds in which a run that is stopped saves

archive() {
    tar czf "$out.tgz" -C "$(dirname "$out")" "$(basename "$out")" && echo "all of it: $out.tgz"
}
trap archive EXIT
trap 'exit 130' INT TERM HUP

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
bench() { part 150 "benchmark $*" "$python" -m benchmarks "${device[@]}" --tasks "$@"; }
row() { part 86400 "row $1 $2" "$python" -m evidence "$1" --only "$2" --seeds 400 --short --run "${flags[@]}" \
    --data "$data" --save "$out/runs"; }

if [ "${SMALL:-}" ]; then
    device=(--small --quick) engines=torch workers=0 flags=(--with="--nhid 8 --batch 500 --epochs 1")
    rows=("sRNN (exponential) expn")
else
    device=(--cuda) engines="triton torch" workers=4 flags=(--cuda)
    rows=("sRNN (exponential) expn" "expRNN none" "nnRNN none" "sRNN, henaff expn" "RNN-Orth, henaff none")
fi
part 60 environment "$python" -m torch.utils.collect_env
part 60 version git describe --always --dirty
part 420 tests "$python" -m pytest -q -m gpu -rfE --tb=short -n $workers tests/engines/test_gpu.py
for engine in $engines; do
    for task in psMNIST characters copying; do bench $task --engine $engine; done
done
for row in "${rows[@]}"; do
    for task in sMNIST language; do row $task "$row"; done
done
