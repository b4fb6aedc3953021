#!/usr/bin/env bash
# OpenCL without a GPU: PoCL and Intel's runtime, which run kernels on the processor, and ocloc, Intel's compiler for its
# GPUs. For Linux on x86-64, with python3, and for ocloc apt-get. Needs no root.
#
#   eval "$(tools/opencl.sh)"     # installs what is not there yet, then sets the environment of this shell
#
# CANDLE_FP8_OPENCL  where to install, instead of ~/.cache/candle-fp8-opencl
set -euo pipefail

wheels=(
    intel-opencl-rt==2026.2.0 intel-cmplr-lib-rt==2026.2.0 tbb==2023.2.0 # Intel's runtime, and the loader libOpenCL
    pocl-binary-distribution==3.0
)
# From Debian's unstable, as no other knows all of Intel's GPUs; what is there now, as older ones do not stay there.
packages=(intel-ocloc libigc2 libigdfcl2)
mirror=http://deb.debian.org/debian
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf 'opencl: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

partial=
finish() {
    local status=$?
    [ -z "$partial" ] || rm -rf "$partial"
    # `eval "$(...)"` sees what is printed, and not the status.
    [ "$status" = 0 ] || echo false
}
trap finish EXIT

[ "$(uname -sm)" = 'Linux x86_64' ] || fail "these runtimes are for Linux on x86-64, not for $(uname -sm)"
root=${CANDLE_FP8_OPENCL:-${XDG_CACHE_HOME:-$HOME/.cache}/candle-fp8-opencl}
# A changed script installs anew, beside what is there: other checkouts may use it right now.
version=$(sha256sum "${BASH_SOURCE[0]}")
home=$root/${version:0:12}

install_wheels() {
    local into=$1
    python3 -m venv "$into/venv" >"$into/log" 2>&1 || {
        cat "$into/log" >&2
        fail 'python3 cannot make a virtual environment; on Debian and Ubuntu, install the package python3-venv'
    }
    # --no-deps: the list above is complete, and exact. --prefix: --target leaves libraries out.
    "$into/venv/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary=:all: --prefix "$into" \
        "${wheels[@]}" >&2 || fail "pip could not install ${wheels[*]}"
    rm -r "$into/venv" "$into/log"
}

# Where the loader looks for runtimes, a folder for each and one with both: a file with the path of a library.
add_vendors() {
    local into=$1 pocl
    pocl=$(cd "$into" && echo lib/python*/site-packages/pyopencl/.libs/libpocl-*.so)
    mkdir -p "$into"/vendors/{both,intel,pocl}
    printf '%s\n' "$home/lib/libintelocl.so" | tee "$into/vendors/intel/intel.icd" >"$into/vendors/both/intel.icd"
    printf '%s\n' "$home/$pocl" | tee "$into/vendors/pocl/pocl.icd" >"$into/vendors/both/pocl.icd"
}

# apt-get with folders of its own, so that it neither needs root nor sees what the system has installed. It checks
# Debian's signatures, and finds all that ocloc depends on: it is unpacked with a C library of its own, and run with that.
install_ocloc() {
    local into=$1 apt=$1/apt package
    type -P apt-get dpkg-deb >/dev/null || fail 'apt-get and dpkg-deb are needed to fetch ocloc from Debian'
    [ -e $keyring ] || fail "$keyring is needed to fetch ocloc from Debian; install the package debian-archive-keyring"
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,parts} "$into/ocloc"
    : >"$apt/status"
    printf 'deb [signed-by=%s] %s sid main\n' $keyring $mirror >"$apt/sources.list"
    cat >"$apt/apt.conf" <<END
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "$apt/parts";
Dir::Etc::preferencesparts "$apt/parts";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "$(id -un)";
Acquire::Languages "none";
END
    { APT_CONFIG=$apt/apt.conf apt-get update -qq &&
        APT_CONFIG=$apt/apt.conf apt-get install -qq -y --download-only --no-install-recommends "${packages[@]}"; } \
        >&2 || fail "apt-get could not fetch ${packages[*]}"
    for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$into/ocloc"; done
    rm -r "$apt"
    mkdir -p "$into/bin"
    cat >"$into/bin/ocloc" <<'END'
#!/usr/bin/env bash
root=$(cd "$(dirname "$0")/../ocloc" && pwd)
libraries=$root/usr/lib/x86_64-linux-gnu
programs=("$root"/usr/bin/ocloc*)
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "${programs[0]}" "$@"
END
    chmod 755 "$into/bin/ocloc"
}

if [ ! -e "$home" ]; then
    type -P python3 >/dev/null || fail 'python3 is needed, with its module venv'
    mkdir -p "$root"
    # Left by installations that were killed.
    find "$root" -maxdepth 1 -name 'partial.*' -mmin +120 -exec rm -rf {} +
    say "installing PoCL, Intel's runtime and ocloc into $home: a download of 0.4 GB, 1.2 GB on disk"
    # Made under another name, so that what has the right one is complete.
    partial=$(mktemp -d "$root/partial.XXXXXX")
    install_wheels "$partial"
    add_vendors "$partial"
    install_ocloc "$partial"
    "$partial/bin/ocloc" ids bmg >/dev/null || fail 'ocloc does not start, or does not know Battlemage'
    chmod 755 "$partial"
    # Another process may have been faster. Then its installation stays.
    mv -T "$partial" "$home" 2>/dev/null || [ -x "$home/bin/ocloc" ] || fail "cannot make $home"
    say "installed: $(du -sh "$home" | cut -f1)"
    for other in "$root"/*; do
        [[ $other == "$home" || $other == */partial.* ]] ||
            say "$other was installed by another version of this script, and may be removed"
    done
fi

# For `eval`, so nothing but exports goes to stdout. To test one runtime alone, set OCL_ICD_VENDORS to the folder `intel` or
# `pocl` beside `both`.
cat <<END
export CANDLE_FP8_OPENCL_HOME=$(printf %q "$home")
export OCL_ICD_VENDORS=\$CANDLE_FP8_OPENCL_HOME/vendors/both
export PATH=\$CANDLE_FP8_OPENCL_HOME/bin:\$PATH
export LD_LIBRARY_PATH=\$CANDLE_FP8_OPENCL_HOME/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
END
