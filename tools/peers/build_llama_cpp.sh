#!/usr/bin/env bash
# Builds llama-bench for this machine's processor, from the sources in the sdist of llama-cpp-python:
# tools/peers/build_llama_cpp.sh [FOLDER]. Needs pip, CMake and a C++ compiler. PYTHON is an interpreter with pip.
set -euo pipefail
version=0.3.36
folder=${1:-$(dirname "$0")/../../target/peers/llama.cpp}
mkdir -p "$folder"
cd "$folder"
if [ ! -d "llama_cpp_python-$version" ]; then
    "${PYTHON:-python3}" -m pip download --no-deps --no-binary :all: "llama-cpp-python==$version"
    tar xf "llama_cpp_python-$version.tar.gz"
fi
cmake -S "llama_cpp_python-$version/vendor/llama.cpp" -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build build --target llama-bench --parallel
echo "built $PWD/build/bin/llama-bench"
