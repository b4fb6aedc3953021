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
            Kernel::Tiled {
                rows: 1,
                runs: true,
            },
            Kernel::Tiled {
                rows: 4,
                runs: false,
            },
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
                .map(|kernel| kernel.launch_on(Some(lanes), false, x, [1, 1]).variant),
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

/// A kernel of divisions alone. Their first guess is a device's own inverse, which the standard lets be off by 2.5
/// steps; here it is off by `OFF` - 2 from the nearest.
pub(super) fn divide_text() -> String {
    let text = include_str!("../kernels/common.h");
    let inverse = "const float inverse = 1.0f / b;";
    let off = "const float inverse = as_float(as_uint(1.0f / b) + OFF - 2);";
    assert_eq!(text.matches(inverse).count(), 1);
    text.replace(inverse, off)
        + "__kernel void quotients(const __global float* a, const __global float* b, __global float* out) {
               const uint i = get_global_id(0);
               out[i] = divide(a[i], b[i]);
           }"
}

/// Pairs of 24-bit integers whose quotient is as near to the middle of two neighbours as it can be: with such a middle
/// Q / 2^25 and an odd b, a · 2^25 = Q · b ± 1, so a Q that is ∓1 / b modulo 2^25.
fn hard_quotients() -> (Vec<f32>, Vec<f32>) {
    let one = 1u64 << 25;
    let mut pairs = Vec::new();
    for b in ((1u64 << 23) + 1..1 << 24).step_by(1 << 10) {
        let mut inverse = 1u64;
        for _ in 0..5 {
            inverse = inverse.wrapping_mul(2u64.wrapping_sub(b.wrapping_mul(inverse)));
        }
        for (middle, rest) in [(inverse % one, -1), (one - inverse % one, 1)] {
            let a = (middle * b).wrapping_add_signed(rest) / one;
            if middle >= one / 2 && a >= 1 << 23 {
                assert_eq!(a * one, (middle * b).wrapping_add_signed(rest));
                pairs.push((a as f32, b as f32));
            }
        }
    }
    pairs.into_iter().unzip()
}

#[test]
fn quotients_are_the_nearest() -> candle_core::Result<()> {
    use candle_core::{DType, Device, Tensor};

    let (mut a, mut b) = hard_quotients();
    assert!(a.len() > 4000, "{} hard ones", a.len());
    // And any others, of all magnitudes that it is for.
    let mut bits = 1u64;
    let mut any = || {
        bits = bits
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let exponent = 127 - 45 + (bits >> 58) as u32;
        f32::from_bits(exponent << 23 | (bits >> 32) as u32 & 0x7f_ffff)
    };
    for _ in 0..1 << 15 {
        a.push(-any());
        b.push(any());
    }
    let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a / b).collect();
    for index in 0..XpuDevice::list().map_or(0, |devices| devices.len()) {
        let device = XpuDevice::new(index)?;
        let upload = |values: &[f32]| {
            let values = Tensor::new(values, &Device::Cpu)?;
            Allocation::of_tensor(&device, &values, a.len(), a.len())
        };
        let (divided, divisors) = (upload(&a)?, upload(&b)?);
        for off in 0..=4 {
            let out = Allocation::of_result(&device, &[a.len()], DType::F32)?;
            let variant = Variant {
                source: Source::Divide,
                x: Element::F32,
                defines: vec![("OFF", off)],
            };
            let args = [&divided, &divisors, &out].map(Arg::Memory);
            // SAFETY: these are its arguments, and each has a value for each work-item.
            unsafe { device.launch(variant, "quotients", &args, [a.len(), 1], [1, 1]) }?;
            let found = out.into_tensor(&[a.len()], DType::F32)?.to_vec1::<f32>()?;
            for i in 0..a.len() {
                assert_eq!(found[i], expected[i], "{} / {}, off {off}", a[i], b[i]);
            }
        }
    }
    Ok(())
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
    // In one piece, as other tests write as well.
    let gpus = GPUS.map(|(gpu, _)| gpu).join(", ");
    let _ = told.write_all(format!("TESTED: kernels compiled for {gpus}\n").as_bytes());
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
