#!/usr/bin/env bash
# Builds the library for 64-bit ARM on another machine, as setup.py does there, and runs check_kernels.cpp in an
# emulator: as on processors with NEON only, with dot products, and with matrix instructions too.
#   PYTHON=python tests/native/arm.sh [what check_kernels.cpp takes, instead of what is enough]
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v $tool > /dev/null && continue
  echo "arm is skipped: there is no $tool here; Debian's packages are g++-aarch64-linux-gnu and qemu-user"
  exit 0
done
out=${BUILD:-$(mktemp -d)}  # BUILD=folder keeps what was built
[ -n "${BUILD:-}" ] || trap 'rm -rf "$out"' EXIT
_PYTHON_HOST_PLATFORM=linux-aarch64 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
  "${PYTHON:-python3}" setup.py -q build_ext --build-temp "$out" --build-lib "$out/lib"
test -f "$out/lib/token_pruning/engine/libtoken_pruning.so"  # setup.py goes on without it
aarch64-linux-gnu-g++ -std=c++17 -O2 -DTP_ARM tests/native/check_kernels.cpp "$out"/src/token_pruning/native/*.o \
  -o "$out/check" -pthread
jobs=()
run() {  # processor, its best level, arguments…
  local cpu=$1 best=$2; shift 2
  {
    found=$(qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu "$cpu" "$out/check" "$@") || exit 1
    echo "$cpu: $found"
    [[ $found == *" $best int8: "* ]] || { echo "$cpu: its best level is not $best"; exit 1; }
  } &
  jobs+=($!)
}
if [ $# -gt 0 ]; then
  run max i8mm "$@"
else
  run max i8mm --quick
  run max i8mm --shapes
fi
run neoverse-n1 dotprod --cases 60
run cortex-a72 neon --cases 60
status=0
for job in "${jobs[@]}"; do wait "$job" || status=1; done
exit $status
