//! That pointers stay in their address spaces. To the emulator a device's memory, that of a group and a thread's own
//! are the same; to a device they are not, and a source that mixes them does not compile there.
//!
//! Clang, of which Apple's compiler is made, checks this of C++ for OpenCL, which has the same address spaces by other
//! names.

use candle_kernels_fp8::metal::Library;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A clang that knows C++ for OpenCL; none, which is said, without one.
fn clang() -> Option<OsString> {
    let clang = std::env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    let knows_both = Command::new(&clang).arg("--version").output().is_ok()
        && complaints(&clang, "nothing", "").is_none();
    if !knows_both {
        crate::skip("no clang 14 or newer for the address spaces of the Metal kernels");
    }
    knows_both.then_some(clang)
}

/// What clang says against a source; nothing if it takes it.
fn complaints(clang: &OsStr, name: &str, source: &str) -> Option<String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metal/address_spaces");
    // Tests run at the same time.
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let name = format!("{name}-{}.clcpp", CALLS.fetch_add(1, Ordering::Relaxed));
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, source).unwrap();
    let output = Command::new(clang)
        .args(["-x", "clcpp", "-cl-std=CLC++2021", "-target", "spir64"])
        .args(["-fsyntax-only", "-w", "-I"])
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
