#!/usr/bin/env bash
# A CUDA toolkit where there is none, from NVIDIA's wheels on PyPI: it compiles and links everything that the feature
# `cuda` builds. A GPU is needed only to run it. For Linux on x86-64 and ARM, with python3 and a C compiler.
#
#   eval "$(tools/cuda-toolkit.sh)"     # installs what is not there yet, then sets the environment of this shell
#
# CANDLE_FP8_CUDA_TOOLKIT  where to install, instead of ~/.cache/candle-fp8-cuda-toolkit
# CUDA_COMPUTE_CAP         the architecture of Candle's own kernels, 90 unless it is set (ours hold every one)
set -euo pipefail

wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 # the compiler
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88
    nvidia-cublas==13.1.2.11 nvidia-curand==10.4.5.25 # what Candle links beside them
    nvidia-cuda-cuobjdump==13.2.86                    # the oldest that is on PyPI
)

say() { printf 'cuda-toolkit: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

partial=
finish() {
    local status=$?
    [ -z "$partial" ] || rm -rf "$partial"
    # `eval "$(...)"` sees what is printed, and not the status.
    [ "$status" = 0 ] || echo false
}
trap finish EXIT

[ "$(uname -s)" = Linux ] || fail "these wheels are for Linux, not for $(uname -s)"
root=${CANDLE_FP8_CUDA_TOOLKIT:-${XDG_CACHE_HOME:-$HOME/.cache}/candle-fp8-cuda-toolkit}
# A changed script installs anew, beside what is there: other checkouts may build with it right now.
version=$(sha256sum "${BASH_SOURCE[0]}")
home=$root/${version:0:12}
cuda=$home/nvidia/cu13

install_wheels() {
    local into=$1
    python3 -m venv "$into/venv" >"$into/log" 2>&1 || {
        cat "$into/log" >&2
        fail 'python3 cannot make a virtual environment; on Debian and Ubuntu, install the package python3-venv'
    }
    # --no-deps: the list above is complete, and exact.
    "$into/venv/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary=:all: --target "$into" \
        "${wheels[@]}" >&2 || fail "pip could not install ${wheels[*]}"
    rm -r "$into/venv" "$into/log"
}

# Linkers look for names without a version, which the wheels leave out; and some programs look in lib64.
add_links() {
    local library
    for library in "$1"/lib/lib*.so.[0-9]*; do
        library=${library##*/}
        [[ $library == *.alt.* ]] || ln -sf "$library" "$1/lib/${library%%.so.*}.so"
    done
    ln -s lib "$1/lib64"
}

# The driver's library comes with a GPU's driver, but programs are linked to it. This one has all of its names, those that
# are only targets of macros too (`cuMemAlloc` means `cuMemAlloc_v2`), and answers every call with
# CUDA_ERROR_STUB_LIBRARY, as NVIDIA's own stub does.
add_driver_stub() {
    local stubs=$1/lib/stubs names=$2
    mkdir "$stubs"
    {
        grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$1"/include/cuda{,EGL,GL,VDPAU}.h
        printf '%s\n' cuProfilerInitialize cuProfilerStart cuProfilerStop # of a header that no wheel has
    } | sort -u >"$names"
    awk '{ print "int " $1 "(void) { return 34; }" }' "$names" |
        "${CC:-cc}" -w -shared -fPIC -fno-builtin -Wl,-soname,libcuda.so.1 -x c - -o "$stubs/libcuda.so" ||
        fail 'a C compiler is needed (on Debian and Ubuntu, the package gcc), or the one that CC names failed'
    # For programs that are started where there is no driver.
    ln -s libcuda.so "$stubs/libcuda.so.1"
    rm "$names"
}

if [ ! -e "$home" ]; then
    type -P python3 >/dev/null || fail 'python3 is needed, with its module venv'
    mkdir -p "$root"
    # Left by installations that were killed.
    find "$root" -maxdepth 1 -name 'partial.*' -mmin +120 -exec rm -rf {} +
    say "installing CUDA 13.0 into $home: a download of 0.7 GB, 1.2 GB on disk"
    # Made under another name, so that what has the right one is complete.
    partial=$(mktemp -d "$root/partial.XXXXXX")
    install_wheels "$partial"
    add_links "$partial/nvidia/cu13"
    add_driver_stub "$partial/nvidia/cu13" "$partial/names"
    chmod 755 "$partial"
    # Another process may have been faster. Then its toolkit stays.
    mv -T "$partial" "$home" 2>/dev/null || [ -x "$cuda/bin/nvcc" ] || fail "cannot make $home"
    say "installed: $(du -sh "$home" | cut -f1)"
    for other in "$root"/*; do
        [[ $other == "$home" || $other == */partial.* ]] ||
            say "$other was installed by another version of this script, and may be removed"
    done
fi

# For `eval`, so nothing but exports goes to stdout. Not RUSTFLAGS, which would rebuild everything: the linker reads
# LIBRARY_PATH.
cat <<END
export CUDA_HOME=$(printf %q "$cuda")
export PATH=\$CUDA_HOME/bin:\$PATH
export LIBRARY_PATH=\$CUDA_HOME/lib:\$CUDA_HOME/lib/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
END
