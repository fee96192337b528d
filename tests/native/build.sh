#!/usr/bin/env bash
# Builds and runs check_kernels.cpp with sanitizers.
#   tests/native/build.sh [address,undefined | thread] [--quick | --shapes | --cases N [--seed S]]
# For another processor: CXX=aarch64-linux-gnu-g++ RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu"
set -euo pipefail
cd "$(dirname "$0")"
sanitizers=${1:-address,undefined}
shift || true
native=../../src/token_pruning/native
out=${BUILD:-$(mktemp -d)}  # BUILD=folder keeps what was built
[ -n "${BUILD:-}" ] || trap 'rm -rf "$out"' EXIT
compile="${CXX:-g++} -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=$sanitizers -fno-sanitize-recover=all"
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512 -w"
x86= arm=
case $(${CXX:-g++} -dumpmachine) in x86_64*) x86=1 ;; aarch64*) arm=1 ;; esac
jobs=()
build() {  # source, flags…
  local source=$1; shift
  $compile ${x86:+-DTP_X86} ${arm:+-DTP_ARM} "$@" -c "$source" -o "$out/$(basename "$source" .cpp).o" &
  jobs+=($!)
}
# A level that this processor cannot run is there for its symbols only: instrumenting it takes the longest.
level() {  # what /proc/cpuinfo calls it, then as above
  [ -n "$x86" ] || return 0
  local flag=$1 compile=$compile; shift
  grep -qw "$flag" /proc/cpuinfo || compile="${CXX:-g++} -std=c++17 -O0"
  build "$@"
}
for source in $native/*.cpp check_kernels.cpp; do
  case $(basename "$source") in
    kernels_avx2.cpp) level avx2 "$source" -mavx2 -mfma ;;
    kernels_avx_vnni.cpp) level avx512_vnni "$source" -mavx2 -mfma -DTP_TEST_AVX_VNNI ;;
    kernels_avx512.cpp) level avx512f "$source" $avx512 ;;
    kernels_avx512_vnni.cpp) level avx512_vnni "$source" $avx512 -mavx512vnni ;;
    kernels_avx512_bf16.cpp) level avx512_bf16 "$source" $avx512 -mavx512vnni -mavx512bf16 ;;
    cpu_level.cpp) build "$source" -DTP_TEST_AVX_VNNI ;;
    kernels_amx.cpp) level amx_int8 "$source" $avx512 -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8 ;;
    kernels_neon.cpp) [ -z "$arm" ] || build "$source" ;;
    kernels_dotprod.cpp) [ -z "$arm" ] || build "$source" -march=armv8.2-a+dotprod ;;
    kernels_i8mm.cpp) [ -z "$arm" ] || build "$source" -march=armv8.2-a+dotprod+i8mm+bf16 ;;
    *) build "$source" ;;
  esac
done
for job in "${jobs[@]}"; do wait "$job"; done
$compile "$out"/*.o -o "$out/check" -pthread
${RUN:-} "$out/check" "$@"
