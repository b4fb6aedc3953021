#!/usr/bin/env bash
# OpenCL without a GPU: PoCL and Intel's runtime, which run kernels on the processor, and ocloc, Intel's compiler for
# its GPUs. For Linux on x86-64, with python3 and apt-get. Needs no root.
#
#   eval "$(tools/opencl.sh)"     # installs what is not there yet, then sets the environment of this shell
#
# CANDLE_FP8_OPENCL  where to install, instead of ~/.cache/candle-fp8-opencl
set -euo pipefail

wheels=(
    intel-opencl-rt==2026.2.0 intel-cmplr-lib-rt==2026.2.0 tbb==2023.2.0 # Intel's runtime, and the loader libOpenCL
)
# PoCL comes from Debian 12, whose C library is older than that of most systems, and does without some of what it asks
# for: compilers of C, and what each system has itself.
pocl=(bookworm pocl-opencl-icd)
without='^(libc6|libc-|libstdc|libgcc|gcc-|lib32|libobjc|libgomp|lib[a-z]*san|binutils|clang-|llvm-|linux-|rpcsvc'
without+='|.*-dev_)'
# ocloc from Debian's unstable, as no other knows all of Intel's GPUs; what is there now, as older ones do not stay
# there.
ocloc=(sid intel-ocloc libigc2 libigdfcl2)
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
libraries=usr/lib/x86_64-linux-gnu

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

# Packages of a Debian suite with all that they depend on, unpacked into a folder but for those that a pattern names.
# apt-get gets folders of its own, so that it neither needs root nor sees what the system has installed; it checks
# signatures.
unpack() {
    local into=$1 without=$2 suite=$3 apt=$1.apt package
    shift 3
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial,parts} "$into"
    : >"$apt/status"
    printf 'deb [signed-by=%s] %s %s main\n' $keyring $mirror "$suite" >"$apt/sources.list"
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
        APT_CONFIG=$apt/apt.conf apt-get install -qq -y --download-only --no-install-recommends "$@"; } \
        >&2 || fail "apt-get could not fetch $* from Debian's $suite"
    for package in "$apt"/cache/archives/*.deb; do
        [[ ${package##*/} =~ $without ]] || dpkg-deb -x "$package" "$into"
    done
    rm -r "$apt"
}

# Where the loader looks for runtimes, a folder for each and one with both: a file with the path of a library.
add_vendors() {
    mkdir -p "$1"/vendors/{both,intel,pocl}
    printf '%s\n' "$home/lib/libintelocl.so" | tee "$1/vendors/intel/intel.icd" >"$1/vendors/both/intel.icd"
    printf '%s\n' "$home/pocl/$libraries/libpocl.so.2" | tee "$1/vendors/pocl/pocl.icd" >"$1/vendors/both/pocl.icd"
}

# It was unpacked with a C library of its own, and is run with that.
add_ocloc() {
    local into=$1
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
    type -P apt-get dpkg-deb >/dev/null || fail 'apt-get and dpkg-deb are needed to fetch PoCL and ocloc from Debian'
    [ -e $keyring ] || fail "$keyring is needed to fetch them from Debian; install the package debian-archive-keyring"
    mkdir -p "$root"
    # Left by installations that were killed.
    find "$root" -maxdepth 1 -name 'partial.*' -mmin +120 -exec rm -rf {} +
    say "installing PoCL, Intel's runtime and ocloc into $home: a download of 0.5 GB, 1.6 GB on disk"
    # Made under another name, so that what has the right one is complete.
    partial=$(mktemp -d "$root/partial.XXXXXX")
    install_wheels "$partial"
    unpack "$partial/pocl" "$without" "${pocl[@]}"
    # Nothing is left out.
    unpack "$partial/ocloc" '^$' "${ocloc[@]}"
    add_vendors "$partial"
    add_ocloc "$partial"
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

# For `eval`, so nothing but exports goes to stdout. To test one runtime alone, set OCL_ICD_VENDORS to the folder
# `intel` or `pocl` beside `both`.
cat <<END
export CANDLE_FP8_OPENCL_HOME=$(printf %q "$home")
export OCL_ICD_VENDORS=\$CANDLE_FP8_OPENCL_HOME/vendors/both
export PATH=\$CANDLE_FP8_OPENCL_HOME/bin:\$PATH
LD_LIBRARY_PATH=\$CANDLE_FP8_OPENCL_HOME/pocl/$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH=\$CANDLE_FP8_OPENCL_HOME/lib:\$LD_LIBRARY_PATH
END
