#!/usr/bin/env bash
# Everything there is to know of hone on a card: whether it is right, then how fast it is. Needs built binaries, the driver and
# NVRTC, neither cargo nor a toolkit; compute-sanitizer is used where it is installed.
#
#   scripts/gpu.sh BINARIES OUT [PEER]
#
# BINARIES holds `hone` and the test programs `cuda` and `torch_parity`, as scripts/collect.sh leaves them. Results go to OUT: a
# log and JSON lines. PEER is a script that measures PyTorch; it runs in the same minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
peer=${3:-}
failed=0

step() {
    local name=$1
    shift
    echo "== $name: $*"
    if "$@" >"$out/$name.txt" 2>&1; then
        tail -n 3 "$out/$name.txt"
    else
        echo "FAILED ($?)"
        tail -n 20 "$out/$name.txt"
        failed=1
    fi
}

step card nvidia-smi
step doctor "$bin/hone" doctor
step kernels-against-the-cpu "$bin/cuda" --test-threads=1
HONE_TEST_DEVICE=cuda step golden-parity "$bin/torch_parity" --test-threads=1

# A small training step under the sanitizer: one captured, others not.
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$bin/hone" bench train --device cuda --precision bf16 --batch 4 --size 64 --seconds 0.1
    done
else
    echo "== compute-sanitizer is not installed: skipped"
fi

bench() {
    "$bin/hone" bench "$@" --device cuda --json | tee -a "$out/bench.jsonl"
}
echo "== benches"
for precision in f32 tf32 bf16; do
    for batch in 1 32 256; do
        bench forward --precision $precision --batch $batch || failed=1
        bench train --precision $precision --batch $batch || failed=1
    done
    bench kernels --precision $precision --batch 256 >"$out/kernels-$precision.jsonl" || failed=1
done
if [ -n "$peer" ]; then
    step peer python3 "$peer"
fi
exit $failed
