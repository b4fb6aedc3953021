//! That pointers stay in their address spaces. To the emulator a device's memory, that of a group and a thread's own are the
//! same; to a device they are not, and a source that mixes them does not compile there.
//!
//! Clang, of which Apple's compiler is made, checks this of C++ for OpenCL, which has the same address spaces by other
//! names.

use candle_kernels_fp8::metal::Library;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

fn clang() -> Option<std::ffi::OsString> {
    let clang = std::env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    if Command::new(&clang).arg("--version").output().is_err() {
        // Past what captures the output of tests. If it cannot be said, the tests are as good.
        let text = "SKIPPED: no clang for the address spaces of the Metal kernels\n";
        let _ = io::stderr().write_all(text.as_bytes());
        return None;
    }
    Some(clang)
}

/// What clang says against a source; nothing if it takes it.
fn complaints(clang: &std::ffi::OsStr, name: &str, source: &str) -> Option<String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metal/address_spaces");
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.clcpp"));
    fs::write(&path, source).unwrap();
    let output = Command::new(clang)
        .args(["-x", "clcpp", "-cl-std=CLC++2021", "-target", "spir64"])
        .args(["-fsyntax-only", "-Wall", "-Wextra", "-Werror"])
        .args(["-Wno-unknown-pragmas", "-Wno-unknown-attributes"])
        .args(["-Wno-unused-parameter", "-Wno-unused-const-variable"])
        .arg("-I")
        .args([&here, &path])
        .output()
        .unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn pointers_stay_in_their_address_spaces() {
    let Some(clang) = clang() else {
        return;
    };
    for library in Library::ALL {
        let found = complaints(&clang, &format!("{library:?}"), library.source());
        assert!(found.is_none(), "{library:?}: {}", found.unwrap());
    }
}

/// That the check sees anything: sources in which one address space is another.
#[test]
fn pointers_to_other_memory_are_seen() {
    let Some(clang) = clang() else {
        return;
    };
    for (library, from, to) in [
        (
            Library::Quantize,
            "uint value, threadgroup uint*",
            "uint value, device uint*",
        ),
        (
            Library::ScaledMmGemv,
            "device const float* x;",
            "thread const float* x;",
        ),
        (
            Library::ScaledMmTile,
            "    threadgroup S* const w_tile",
            "    thread S* const w_tile",
        ),
    ] {
        let source = library.source().replace(from, to);
        assert_ne!(source, library.source(), "{library:?}: {from}");
        let found = complaints(&clang, &format!("{library:?}-mixed"), &source);
        assert!(found.is_some(), "{library:?}: {to} went unnoticed");
    }
}
