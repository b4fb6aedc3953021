//! Every CUDA kernel for products, over every problem that it serves. Without a GPU, what needs one is skipped.

#[path = "../../../tests/oracle/mod.rs"]
mod oracle;
#[path = "../support_cuda/mod.rs"]
mod support_cuda;

mod cases;
mod problem;

use candle_kernels_fp8::ScaleLayout;
use candle_kernels_fp8::cuda::{
    Accumulation, Activations, Float, Kernel, ScaledMm, Scaling, WeightLayout, scaled_mm_with,
};
use oracle::cases::{Random, table};
use problem::{Problem, Uploaded, X, run, values_of};
use std::collections::{BTreeMap, BTreeSet};
use support_cuda::{Device, say};

/// Failures that are told.
const MOST: usize = 40;

/// What was run: the largest error of each kernel, relative to the norm of the terms, and what failed.
#[derive(Default)]
struct Report {
    errors: BTreeMap<String, f64>,
    runs: usize,
    failures: Vec<String>,
}

impl Report {
    /// Runs all kernels that serve a problem, with its weight in each layout: to the bit the same results, whatever
    /// copies the weight, since the same numbers are added up in the same order.
    fn check(&mut self, device: &Device, name: &str, problem: &Problem) {
        self.check_those(device, name, problem, |runs| runs);
    }

    /// As [`Report::check`], of the runs that `choose` leaves.
    fn check_those(
        &mut self,
        device: &Device,
        name: &str,
        problem: &Problem,
        choose: impl Fn(Vec<Run>) -> Vec<Run>,
    ) {
        let expected = problem.expected();
        let uploaded = problem.upload(device);
        let mut of_rows: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (kernel, args) in choose(runs(device, &uploaded)) {
            self.runs += 1;
            let in_rows = args.weight_layout != WeightLayout::Panels;
            let base = kernel.to_string().trim_end_matches(" pieces").to_string();
            let result = run(device, kernel, &args).and_then(|found| {
                if let Some(rows) = of_rows.get(&base).filter(|_| !in_rows) {
                    same(rows, &found, problem.n)?;
                }
                let error = problem.check(kernel, &found, &expected);
                if in_rows {
                    of_rows.insert(base, found);
                }
                error
            });
            match result {
                Ok(error) => {
                    let kind = match &problem.x {
                        X::Values(_, float) => format!("{kernel} {float:?}"),
                        X::Codes(..) => format!("{kernel} codes {:?}", problem.accumulation),
                    };
                    let largest = self.errors.entry(kind).or_default();
                    *largest = largest.max(error);
                }
                Err(text) => {
                    let x = match &problem.x {
                        X::Values(_, float) => format!("{float:?}"),
                        X::Codes(.., scaling) => format!("codes {scaling:?}"),
                    };
                    let &Problem { m, n, k, .. } = problem;
                    self.failures.push(format!(
                        "{kernel}: {name} [{m}, {n}, {k}] {x}, weight in {}, scales {:?}, bias {}, {:?} out, {:?}, \
                         padding {}, dependent {}: {text}",
                        if in_rows { "rows" } else { "panels" },
                        problem.layout,
                        problem.bias.is_some(),
                        problem.out,
                        problem.accumulation,
                        problem.padding,
                        problem.dependent,
                    ));
                    // No kernel runs any more after one that left its memory.
                    assert!(!self.is_lost(device), "{}", self.failures.join("\n"));
                }
            }
        }
    }

    fn is_lost(&self, device: &Device) -> bool {
        device.stream.synchronize().is_err()
    }

    fn finish(self, name: &str) {
        say(&format!(
            "{name}: {} runs, {} failures",
            self.runs,
            self.failures.len()
        ));
        for (kernel, error) in &self.errors {
            say(&format!(
                "  {kernel}: largest error 2^{:.1} of the norm",
                error.log2()
            ));
        }
        let told = self.failures.len().min(MOST);
        assert!(
            self.failures.is_empty(),
            "{}",
            self.failures[..told].join("\n")
        );
    }
}

/// A kernel and what it computes.
type Run = (Kernel, ScaledMm);

/// Kernels with the arguments that they serve: each with a weight in rows before the same in panels, and before the
/// kernels that differ from it in copies only.
fn runs(device: &Device, uploaded: &Uploaded) -> Vec<Run> {
    let both = |kernel| uploaded.args.map(|args| (kernel, args));
    let all = Kernel::all().into_iter().flat_map(both);
    all.filter(|(kernel, args)| kernel.serves(device.gpu, args))
        .collect()
}

/// Of kernels that are the same code with other numbers, the last, with a weight in each layout.
fn one_of_each(runs: Vec<Run>) -> Vec<Run> {
    let code = |(kernel, args): &Run| {
        let name = kernel.to_string();
        // Numbers of blocks, and of rows.
        let name = name.split('/').next().unwrap_or(&name);
        let name = match name.contains("skinny") {
            true => name.replace(|c: char| c.is_ascii_digit(), ""),
            false => name.to_string(),
        };
        (name, args.weight_layout == WeightLayout::Panels)
    };
    let last: BTreeMap<_, _> = runs.iter().map(code).zip(0..).collect();
    let last: BTreeSet<usize> = last.into_values().collect();
    let kept = runs.into_iter().enumerate();
    kept.filter(|(i, _)| last.contains(i))
        .map(|(_, run)| run)
        .collect()
}

/// Whether results of a weight in panels are those of the same in rows.
fn same(rows: &[f64], panels: &[f64], n: usize) -> Result<(), String> {
    let differ = |(a, b): (&f64, &f64)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
    let wrong = rows.iter().zip(panels).filter(|&pair| differ(pair)).count();
    match rows.iter().zip(panels).position(differ) {
        None => Ok(()),
        Some(at) => Err(format!(
            "[{}, {}] is {:e}, and {:e} of the weight in rows ({wrong} of {} differ)",
            at / n,
            at % n,
            panels[at],
            rows[at],
            rows.len()
        )),
    }
}

#[test]
fn the_case_table() {
    let Some(device) = Device::get() else { return };
    let mut report = Report::default();
    for case in table() {
        let problem = cases::of_case(&case, &case.data());
        report.check(&device, "case", &problem);
    }
    report.finish("the case table");
}

/// Sizes around those of tiles, with all that a product can be made of.
#[test]
fn every_size() {
    let Some(device) = Device::get() else { return };
    let mut report = Report::default();
    let mut served = BTreeSet::new();
    for (seed, &sizes) in cases::sizes().iter().enumerate() {
        let (layout, scaling) = cases::OF_CODES[seed % cases::OF_CODES.len()];
        let codes = cases::problem(sizes, layout, scaling, None, seed as u64);
        let layout = cases::OF_VALUES[seed % cases::OF_VALUES.len()];
        // Most models are of the first.
        let float = [Float::Bf16, Float::F16, Float::Bf16, Float::F32, Float::F16][seed % 5];
        let values = cases::problem(sizes, layout, scaling, Some(float), seed as u64);
        for problem in [codes, values] {
            report.check(&device, "size", &problem);
            let runs = runs(&device, &problem.upload(&device)).into_iter();
            served.extend(runs.map(|(kernel, _)| kernel.to_string()));
        }
    }
    for kernel in Kernel::all() {
        if !served.contains(&kernel.to_string()) {
            say(&format!("SKIPPED: {kernel} serves nothing on this GPU"));
        }
    }
    report.finish("every size");
}

/// The code of each kernel, by few and small problems: for tools under which launches take long. One K goes round every
/// ring.
fn each_kernel(of: &str, sizes: &[Sizes], scales: (ScaleLayout, Scaling), float: Option<Float>) {
    let Some(device) = Device::get() else { return };
    let mut report = Report::default();
    for (seed, &sizes) in (6000..).zip(sizes) {
        let problem = cases::problem(sizes, scales.0, scales.1, float, seed);
        report.check_those(&device, of, &problem, one_of_each);
    }
    report.finish(of);
}

type Sizes = (usize, usize, usize);

#[test]
fn each_kernel_of_few_rows() {
    let sizes = [(2, 70, 8528), (20, 130, 1040), (40, 130, 1040)];
    each_kernel("few rows", &sizes, cases::OF_CODES[0], None);
}

#[test]
fn each_kernel_of_many_rows() {
    each_kernel("many rows", &[(150, 260, 1040)], cases::OF_CODES[0], None);
}

#[test]
fn each_kernel_of_blocks_and_few_rows() {
    let sizes = [(5, 130, 656), (20, 130, 656), (40, 130, 656)];
    each_kernel("blocks, few rows", &sizes, cases::OF_CODES[1], None);
}

#[test]
fn each_kernel_of_blocks_and_many_rows() {
    // Of 1536, rows of scales are whole pieces of 16 bytes.
    let sizes = [(150, 260, 656), (150, 260, 1536)];
    each_kernel("blocks, many rows", &sizes, cases::OF_CODES[1], None);
}

#[test]
fn each_kernel_of_values() {
    let (rows, blocks) = (cases::OF_CODES[0], cases::OF_CODES[1]);
    each_kernel("few values", &[(3, 130, 528)], rows, Some(Float::Bf16));
    each_kernel("many values", &[(150, 260, 528)], rows, Some(Float::F16));
    each_kernel(
        "values and blocks",
        &[(70, 260, 528)],
        blocks,
        Some(Float::Bf16),
    );
}

/// Products of more tiles than multiprocessors, for kernels whose blocks stay and take one tile after the other: what a ring
/// holds of the last tile must not get into the next. Five and a bit steps along K start each tile at another stage.
#[test]
fn tiles_follow_each_other() {
    let Some(device) = Device::get() else { return };
    let mut report = Report::default();
    let mut seed = 4000;
    for (m, n) in [
        (3, 9000),
        (12, 9000),
        (30, 9000),
        (50, 9000),
        (150, 2600),
        (1100, 4200),
    ] {
        for (layout, scaling) in [
            (ScaleLayout::Channel, Scaling::Token),
            (cases::OF_VALUES[1], Scaling::Group(128)),
            (ScaleLayout::Channel, Scaling::Group(384)),
            (
                ScaleLayout::Block {
                    rows: 256,
                    cols: 384,
                },
                Scaling::Token,
            ),
        ] {
            seed += 1;
            let problem = cases::problem((m, n, 656), layout, scaling, None, seed);
            report.check(&device, "tiles", &problem);
        }
    }
    for float in [Float::Bf16, Float::F16] {
        for (layout, scaling) in cases::OF_CODES.into_iter().take(2) {
            seed += 1;
            let problem = cases::problem((1100, 5200, 400), layout, scaling, Some(float), seed);
            report.check(&device, "tiles", &problem);
        }
    }
    report.finish("tiles that follow each other");
}

/// Rows that end anywhere between two multiples of 16.
#[test]
fn any_length() {
    let Some(device) = Device::get() else { return };
    let mut report = Report::default();
    for (i, k) in [1, 7, 9, 77, 130, 251, 1001].into_iter().enumerate() {
        for (j, float) in [None, Some(Float::Bf16), Some(Float::F16)]
            .into_iter()
            .enumerate()
        {
            let (layout, scaling) = cases::OF_CODES[(i + j) % 2];
            for (m, n) in [(3, 70), (20, 129), (150, 300)] {
                let seed = 5000 + 10 * i + j;
                let problem = cases::problem((m, n, k), layout, scaling, float, seed as u64);
                report.check(&device, "length", &problem);
            }
        }
    }
    report.finish("any length");
}

/// Each code in each place that matters, subnormals and NaN included, against an activation of 1: exact.
#[test]
fn every_code_everywhere() {
    let Some(device) = Device::get() else { return };
    let mut failures = Vec::new();
    let (n, k) = (256, 208);
    for m in [1, 3, 12, 20, 130] {
        for float in [None, Some(Float::Bf16), Some(Float::F16), Some(Float::F32)] {
            for (shift, at) in [0, 1, 5, 15, 16, 63, 64, 127, 130, 192, 207]
                .into_iter()
                .enumerate()
            {
                let shift = shift * 47;
                let code = |row: usize| ((row + shift) % 256) as u8;
                // A NaN times zero is a NaN: only the weight at `at` may be one.
                let weight = (0..n * k).map(|i| match (code(i / k), i % k == at) {
                    (0x7f | 0xff, false) => 0x38,
                    (code, _) => code,
                });
                let ones: Vec<bool> = (0..m * k).map(|i| i % k == at).collect();
                let x = match float {
                    None => {
                        let codes = ones.iter().map(|&one| if one { 0x38 } else { 0 }).collect();
                        X::Codes(codes, vec![1.0; m], Scaling::Token)
                    }
                    Some(float) => X::Values(
                        ones.iter().map(|&one| f32::from(u8::from(one))).collect(),
                        float,
                    ),
                };
                let problem = Problem {
                    m,
                    n,
                    k,
                    x,
                    weight: weight.collect(),
                    scales: vec![1.0],
                    layout: ScaleLayout::Tensor,
                    bias: None,
                    out: Float::F32,
                    accumulation: Accumulation::Promoted,
                    padding: 0,
                    dependent: false,
                };
                let uploaded = problem.upload(&device);
                for (kernel, args) in runs(&device, &uploaded) {
                    let found = run(&device, kernel, &args)
                        .unwrap_or_else(|error| panic!("{kernel}: {error}"));
                    let wrong = found.iter().enumerate().find(|(i, found)| {
                        let expected = oracle::decode(code(i % n));
                        **found != expected && !(found.is_nan() && expected.is_nan())
                    });
                    if let Some((i, found)) = wrong {
                        let code = code(i % n);
                        failures.push(format!(
                            "{kernel}, {:?}, {float:?} [{m}, {n}, {k}]: code {code:#x} at {at} gives {found} at \
                             [{}, {}]",
                            args.weight_layout,
                            i / n,
                            i % n
                        ));
                    }
                }
            }
        }
    }
    let told = failures.len().min(MOST);
    assert!(failures.is_empty(), "{}", failures[..told].join("\n"));
}

/// A NaN in a row of the weight makes its column NaN, one in a row of activations its row, and nothing else.
#[test]
fn nan_goes_where_it_belongs() {
    let Some(device) = Device::get() else { return };
    let mut report = Report::default();
    let mut seed = 1000;
    for (m, n, k) in [
        (5, 130, 272),
        (16, 96, 1040),
        (40, 129, 400),
        (200, 300, 528),
    ] {
        for layout in [ScaleLayout::Channel, cases::OF_VALUES[1]] {
            for float in [None, Some(Float::Bf16), Some(Float::F16), Some(Float::F32)] {
                seed += 1;
                let group = Scaling::Group(128);
                let scaling = if layout == ScaleLayout::Channel {
                    Scaling::Token
                } else {
                    group
                };
                let mut problem = cases::problem((m, n, k), layout, scaling, float, seed);
                let mut random = Random(seed);
                for row in (0..n).filter(|row| row % 7 == 3) {
                    problem.weight[row * k + random.bits() as usize % k] = [0x7f, 0xff][row % 2];
                }
                for row in (0..m).filter(|row| row % 5 == 1) {
                    let at = row * k + random.bits() as usize % k;
                    match &mut problem.x {
                        X::Codes(codes, ..) => codes[at] = 0x7f,
                        X::Values(values, _) => values[at] = f32::NAN,
                    }
                }
                report.check(&device, "NaN", &problem);
            }
        }
    }
    report.finish("NaN");
}

/// Scales whose products leave f32's normal range, or meet others that are 2^60 times as large.
#[test]
fn extreme_scales() {
    let Some(device) = Device::get() else { return };
    let mut report = Report::default();
    let mut seed = 2000;
    for (of_x, of_weight) in [
        (2f32.powi(-126), 2f32.powi(-20)),
        (2f32.powi(-70), 2f32.powi(-70)),
        (2f32.powi(50), 2f32.powi(50)),
        (2f32.powi(-100), 2f32.powi(100)),
        (1e-30, 1e30),
    ] {
        for m in [1, 9, 70, 150] {
            for (layout, scaling) in cases::OF_CODES.into_iter().take(5) {
                seed += 1;
                let mut problem = cases::problem((m, 136, 400), layout, scaling, None, seed);
                problem.out = Float::F32;
                let X::Codes(_, scales, _) = &mut problem.x else {
                    unreachable!("codes were asked for");
                };
                scales.iter_mut().for_each(|scale| *scale *= of_x);
                for (i, scale) in problem.scales.iter_mut().enumerate() {
                    // Neighbours along K, too, where a row has several.
                    *scale *= of_weight * if i % 3 == 1 { 2f32.powi(-20) } else { 1.0 };
                }
                report.check(&device, "scales", &problem);
            }
        }
    }
    report.finish("extreme scales");
}

/// Scales, or values, that the kernel before writes while the dependent one has started.
#[test]
fn a_dependent_launch_waits() {
    let Some(device) = Device::get() else { return };
    if !device.gpu.launches_dependents() {
        say("SKIPPED: this GPU launches no dependents");
        return;
    }
    let mut failures = Vec::new();
    let (n, k) = (300, 512);
    for m in [1, 8, 16, 40, 64, 200] {
        for float in [None, Some(Float::Bf16), Some(Float::F16)] {
            // The first product is [m, k] for values, [m, 1] for scales, of a long K.
            let (width, long) = (float.map_or(1, |_| k), 4096);
            let (channel, token) = (ScaleLayout::Channel, Scaling::Token);
            let mut first = cases::problem((m, width, long), channel, token, None, 3000 + m as u64);
            // Nothing leaves the range of F16.
            first
                .scales
                .iter_mut()
                .for_each(|scale| *scale *= 2f32.powi(-12));
            first.out = float.unwrap_or(Float::F32);
            let before = first.upload(&device);
            let second = cases::problem((m, n, k), channel, token, float, 3001 + m as u64);
            let after = second.upload(&device);
            for (kernel, after) in runs(&device, &after) {
                let outcome = |dependent: bool| -> Vec<f64> {
                    let between = device.upload(&vec![0xff; m * width * first.out.size()]);
                    let out = device.upload(&vec![0xff; m * n * second.out.size()]);
                    let mut first = ScaledMm {
                        out: between.address,
                        dependent: false,
                        ..before.args[0]
                    };
                    first.accumulation = Accumulation::Promoted;
                    let mut second = ScaledMm {
                        out: out.address,
                        dependent,
                        ..after
                    };
                    match &mut second.activations {
                        Activations::Values { values, .. } => *values = between.address,
                        Activations::Codes { scales, .. } => *scales = between.address,
                    }
                    if float.is_some() {
                        second.row_stride = k;
                    }
                    let slow = Kernel::all()
                        .into_iter()
                        .find(|kernel| kernel.to_string().starts_with("any"))
                        .expect("a kernel that serves everything");
                    // SAFETY: the memory is as large as the arguments say, and lives until the download has waited.
                    unsafe {
                        scaled_mm_with(&device.stream, &first, slow).expect("a launch");
                        if !dependent {
                            device.stream.synchronize().expect("the first product");
                        }
                        scaled_mm_with(&device.stream, &second, kernel).expect("a launch");
                    }
                    values_of(
                        &device.download(&out).expect("the second product"),
                        second.out_float,
                    )
                };
                let (expected, found) = (outcome(false), outcome(true));
                let bits = |values: &[f64]| -> Vec<u64> {
                    values.iter().map(|value| value.to_bits()).collect()
                };
                if bits(&expected) != bits(&found) || expected.iter().any(|value| value.is_nan()) {
                    let layout = after.weight_layout;
                    failures.push(format!("{kernel}, {layout:?}, {float:?}, {m} rows"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The sums that the other tests compare with, in another order than the oracle's, which is slow.
#[test]
fn sums_agree_with_the_oracle() {
    for case in table() {
        let data = case.data();
        let expected = case.expected(&data);
        let found = cases::of_case(&case, &data).expected();
        let sums = [
            (&expected.values, &found.values, &expected.magnitudes),
            (
                &expected.magnitudes,
                &found.magnitudes,
                &expected.magnitudes,
            ),
            (&expected.unscaled, &found.unscaled, &expected.unscaled),
            (&expected.norms, &found.norms, &expected.norms),
        ];
        for (one, other, magnitudes) in sums {
            assert_eq!(one.len(), other.len(), "{case:?}");
            for ((one, other), magnitude) in one.iter().zip(other).zip(magnitudes) {
                // K additions in f64, and a few products.
                let bound = (case.k + 4) as f64 * 2f64.powi(-52) * magnitude;
                assert!((one - other).abs() <= bound, "{case:?}: {one} and {other}");
            }
        }
    }
}

#[test]
fn sizes_cover_all() {
    let sizes = cases::sizes();
    let partners = |of: fn(&(usize, usize, usize)) -> (usize, usize)| {
        let mut partners: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for size in &sizes {
            let (key, partner) = of(size);
            partners.entry(key).or_default().insert(partner);
        }
        partners
    };
    for (partners, values) in [
        (partners(|&(m, n, _)| (m, n)), &cases::M[..]),
        (partners(|&(m, _, k)| (m, k)), &cases::M[..]),
        (partners(|&(_, n, k)| (n, k)), &cases::N[..]),
        (partners(|&(m, _, k)| (k, m)), &cases::K[..]),
    ] {
        assert!(partners.keys().eq(values), "{partners:?}");
        assert!(
            partners.values().all(|partners| partners.len() >= 4),
            "{partners:?}"
        );
    }
}
