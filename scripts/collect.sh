#!/usr/bin/env bash
# Builds hone and its test programs and puts them, stripped, into a folder that can be taken to a machine with a card.
#
#   scripts/collect.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
cargo build --release --locked
cp target/release/hone "$1/hone"
for test in cuda torch_parity; do
    program=$(cargo test --release --locked --test $test --no-run 2>&1 | sed -n 's/.*(\(target[^)]*\)).*/\1/p')
    cp "$program" "$1/$test"
done
strip "$1"/hone "$1"/cuda "$1"/torch_parity
ls -l "$1"
