//! Compiles the CUDA kernels, where the feature `cuda` asks for them, to one fat binary for each source file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

const SOURCES: &str = "src/cuda/kernels";
const OLDEST: (u32, u32) = (12, 4);

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={SOURCES}");
    for name in [
        "NVCC",
        "NVCC_APPEND_FLAGS",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_ROOT",
        "PATH",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if let Err(message) = build() {
        // Not a panic, whose backtrace would hide the message.
        println!("cargo::error={message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let (nvcc, (major, minor)) = nvcc()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let number = (major * 1000 + minor * 10).to_string();
    fs::write(out.join("cuda_version"), number).map_err(|error| error.to_string())?;
    let mut sources: Vec<PathBuf> = fs::read_dir(SOURCES)
        .map_err(|error| format!("{SOURCES}: {error}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    // The largest first, so that none is left to the end alone.
    sources.sort_by_key(|path| fs::metadata(path).map_or(0, |file| file.len()));

    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (queue, errors) = (Mutex::new(sources), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(source) = { queue.lock().unwrap().pop() } {
                    if let Err(error) = compile(&nvcc, &source, &out) {
                        errors.lock().unwrap().push(error);
                    }
                }
            });
        }
    });
    match errors.into_inner().unwrap().first() {
        Some(error) => Err(error.clone()),
        None => Ok(()),
    }
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> Result<(), String> {
    let stem = source.file_stem().unwrap().to_str().unwrap();
    let mut command = Command::new(nvcc);
    command
        .args(["-fatbin", "-std=c++17", "-O3"])
        .args(["-Xfatbin", "-compress-all"]);
    // Hopper's own instructions exist on no other card. All else is for Ada, Hopper and, as PTX, for what came after them.
    let targets: &[&str] = if stem.starts_with("sm90_") {
        &["arch=compute_90a,code=sm_90a"]
    } else {
        &[
            "arch=compute_89,code=sm_89",
            "arch=compute_90,code=[sm_90,compute_90]",
        ]
    };
    for target in targets {
        command.args(["-gencode", target]);
    }
    command
        .arg("-o")
        .arg(out.join(stem).with_extension("fatbin"));
    command.arg(source);
    let output = command
        .output()
        .map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let log = [output.stdout, output.stderr].concat();
    let log = String::from_utf8_lossy(&log).trim().replace('\n', " | ");
    Err(format!(
        "nvcc could not compile {}: {log}",
        source.display()
    ))
}

/// The compiler and its version: `NVCC`, or the one of `CUDA_HOME`, `CUDA_PATH` or `CUDA_ROOT`, or the one on the `PATH`.
fn nvcc() -> Result<(PathBuf, (u32, u32)), String> {
    let homes = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"];
    let of_home = |name| Some(Path::new(&env::var_os(name)?).join("bin/nvcc"));
    let nvcc = env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(|| homes.iter().filter_map(of_home).find(|nvcc| nvcc.exists()))
        .unwrap_or_else(|| PathBuf::from("nvcc"));
    let (major, minor) = OLDEST;
    let advice = format!(
        "The feature `cuda` needs nvcc {major}.{minor} or newer and a C++ compiler. Install the CUDA toolkit \
         (https://developer.nvidia.com/cuda-downloads; tools/cuda-toolkit.sh installs one from PyPI) and put nvcc on the \
         PATH, or build without the feature."
    );
    let output = Command::new(&nvcc)
        .arg("--version")
        .output()
        .map_err(|error| format!("{}: {error}. {advice}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .split("release ")
        .nth(1)
        .and_then(|rest| rest.split([',', ' ']).next())
        .and_then(|version| version.split_once('.'))
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| format!("{} --version says no version. {advice}", nvcc.display()))?;
    if version < OLDEST {
        let (found_major, found_minor) = version;
        return Err(format!(
            "{} is version {found_major}.{found_minor}. {advice}",
            nvcc.display()
        ));
    }
    Ok((nvcc, version))
}
