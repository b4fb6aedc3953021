//! Kernels through Intel's compiler for its GPUs, where it is installed.

use super::*;
use crate::kernel_choice::Kernel;
use std::io::Write;
use std::process::Command;

/// Data Center Max, Battlemage, Lunar Lake, Panther Lake and Arc A, with the lanes that their matrix units ask for.
const GPUS: [(&str, usize); 5] = [
    ("pvc", 16),
    ("bmg", 16),
    ("lnl", 16),
    ("ptl", 16),
    ("dg2", 8),
];

fn variants(lanes: usize) -> Vec<Variant> {
    use Element::{Bf16, E4m3, F16, F32};
    let mut variants = Vec::new();
    for source in [Source::Quantize, Source::SiluMul] {
        variants.extend([Bf16, F16, F32].map(|x| Variant {
            source,
            x,
            defines: Vec::new(),
        }));
    }
    for x in [Bf16, F16, F32, E4m3] {
        let mut kernels = vec![
            Kernel::Any { rows: 16, cols: 16 },
            Kernel::Few {
                rows: 1,
                features: 4,
                runs: false,
            },
            Kernel::Few {
                rows: 8,
                features: 1,
                runs: true,
            },
        ];
        if x != F32 {
            kernels.push(Kernel::Matrix {
                tiles: 1,
                runs: false,
            });
            kernels.push(Kernel::Matrix {
                tiles: 4,
                runs: true,
            });
        }
        variants.extend(
            kernels
                .into_iter()
                .map(|kernel| kernel.launch_on(lanes, false, x, [1, 1]).variant),
        );
    }
    variants
}

#[test]
fn a_kernel_that_does_not_compile_shows_the_log() {
    let device = match XpuDevice::new(0) {
        Ok(device) => device,
        Err(Error::NoOpenCl | Error::NoDevice { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    // No name for a function.
    let defines = vec![("divide", 7)];
    let variant = Variant {
        source: Source::Quantize,
        x: Element::F32,
        defines,
    };
    // SAFETY: it is not launched.
    let error = unsafe { device.launch(variant, "quantize", &[], [1, 1], [1, 1]) }.unwrap_err();
    let Error::Build { log, .. } = &error else {
        panic!("{error}");
    };
    assert!(log.contains("error"), "{log}");
    let text = error.to_string();
    for part in [
        log,
        "quantize (-DX=2 -Ddivide=7) does not compile",
        &device.info().name,
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}

#[test]
fn kernels_compile_for_intels_gpus() {
    // Past what captures the output of tests. If it cannot be said, the tests are as good.
    let mut told = std::io::stderr();
    if Command::new("ocloc").arg("--help").output().is_err() {
        let _ = writeln!(told, "SKIPPED: no ocloc");
        return;
    }
    let folder = std::env::temp_dir().join(format!("candle-fp8-xpu-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for sources");
    std::thread::scope(|scope| {
        for gpus in [&GPUS[..2], &GPUS[2..]] {
            let folder = &folder;
            scope.spawn(move || {
                gpus.iter()
                    .for_each(|&(gpu, lanes)| compile(folder, gpu, lanes))
            });
        }
    });
    std::fs::remove_dir_all(&folder).expect("the folder goes");
    let _ = writeln!(
        told,
        "TESTED: kernels compiled for {}",
        GPUS.map(|(gpu, _)| gpu).join(", ")
    );
}

fn compile(folder: &std::path::Path, gpu: &str, lanes: usize) {
    for (index, variant) in variants(lanes).iter().enumerate() {
        let source = folder.join(format!("{gpu}_{index}.cl"));
        std::fs::write(&source, variant.source.text()).expect("a source");
        let output = Command::new("ocloc")
            .args([
                "compile",
                "-device",
                gpu,
                "-options",
                &variant.options(),
                "-out_dir",
            ])
            .arg(folder)
            .arg("-file")
            .arg(&source)
            .output()
            .expect("ocloc runs");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let clean = output.status.success() && !text.contains("warning") && !text.contains("error");
        assert!(
            clean,
            "{} ({}) for {gpu}: {text}",
            variant.source.name(),
            variant.options()
        );
    }
}
