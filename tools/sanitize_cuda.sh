#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the tests of the CUDA kernels. Needs a GPU. Fails on any finding.
#
#   tools/sanitize_cuda.sh [-q] [-t TOOL]... [-f FILTER]... [BINARY]...
#
#   -t TOOL    memcheck, racecheck, initcheck or synccheck; without it, all four one after the other
#   -q         few tests under each tool, as racecheck has them anyway, which takes long
#   -f FILTER  instead of these, the tests whose names contain FILTER
#   BINARY     test programs; without one, cargo builds those of candle-kernels-fp8
#
# One line for each tool and program; on a finding, what the sanitizer said of it too.
set -euo pipefail

# All kernels, few sizes: with a K that goes round the rings of buffers, and launches that wait for others.
few=(
    each_kernel a_dependent_launch_waits                                                # cuda_scaled_mm, cuda_token
    dependent_launches every_group every_type every_layout every_length rows_are_padded # cuda_token
    weights_are_packed
)

fail() { printf '%s\n' "$*" >&2; exit 1; }
usage() { sed -n '4,9s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

tools=() filters=() quick=
while getopts qt:f: option; do
    case $option in
        q) quick=1 ;;
        t) tools+=("$OPTARG") ;;
        f) filters+=("$OPTARG") ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)

sanitizer=$(type -P compute-sanitizer || true)
for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
    for path in "$home"/{bin,compute-sanitizer}/compute-sanitizer; do
        [ -n "$sanitizer" ] || [ ! -x "$path" ] || sanitizer=$path
    done
done
[ -n "$sanitizer" ] || fail 'compute-sanitizer, a part of the CUDA toolkit, is neither on the PATH nor in CUDA_HOME'

binaries=("$@")
if [ ${#binaries[@]} = 0 ]; then
    cd "$(dirname "$0")/.."
    # So that findings name lines of source, and that racecheck knows who speaks for a warp (kernels/sm90.cuh).
    export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -lineinfo -DEVERY_LANE_ARRIVES"
    built=$(cargo test -p candle-kernels-fp8 --features cuda --locked --test 'cuda_*' --no-run --message-format json)
    mapfile -t binaries < <(grep -oP '"executable":"\K[^"]+' <<<"$built")
    [ ${#binaries[@]} -gt 0 ] || fail 'cargo built no tests for CUDA'
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
found=0

# sanitize TOOL BINARY
sanitize() {
    local tool=$1 binary=$2 chosen=() name=${2##*/} start=$SECONDS verdict
    if [ ${#filters[@]} -gt 0 ]; then
        chosen=("${filters[@]}")
    elif [ -n "$quick" ] || [ "$tool" = racecheck ]; then
        chosen=("${few[@]}")
        # A program that has none of them runs all that it has.
        "$binary" "${few[@]}" --list | grep -q ': test$' || chosen=()
    fi
    local status=0
    "$sanitizer" --tool "$tool" --print-limit 20 --error-exitcode 99 \
        "$binary" --test-threads 1 ${chosen[@]+"${chosen[@]}"} >"$log" 2>&1 || status=$?

    local tests summary
    tests=$(grep -oP '^test result: .* \K[0-9]+(?= passed)' "$log" || true)
    summary=$(grep -oP '^=+ (ERROR|RACECHECK) SUMMARY: \K.*' "$log" | tail -n 1 || true)
    if grep -q 'SKIPPED: no CUDA device' "$log"; then
        verdict='no GPU was found'
    elif [ "${tests:-0}" = 0 ]; then
        verdict='no test passed'
    elif [ "$status" != 0 ] || [[ ! $summary =~ ^0\ (errors|hazards) || $summary =~ [1-9]\ warning ]]; then
        verdict=${summary:-no summary}
    else
        printf '%-9s %-32s clean: %s tests, %s s\n' "$tool" "$name" "$tests" $((SECONDS - start))
        return
    fi
    found=1
    printf '%-9s %-32s FAILED: %s (status %s), %s s\n' "$tool" "$name" "$verdict" "$status" $((SECONDS - start))
    # What the sanitizer said, and the end of what the tests did.
    grep -a '^=========' "$log" | head -n 80 || true
    grep -av '^=========' "$log" | tail -n 20 || true
}

for tool in "${tools[@]}"; do
    for binary in "${binaries[@]}"; do
        sanitize "$tool" "$binary"
    done
done
exit $found
