//! Attention: near softmax(q · kᵀ · scale) · v in f64, in every kernel.

use candle_kernels_fp8::cuda::{
    self, Attention, AttentionKernel, Float, Heads, Positions, attention_scratch,
};
use rayon::prelude::*;

use crate::oracle::cases::Random;
use crate::rows::{Rows, Values, oracle_float, round, to_bytes, widen};
use crate::support_cuda::{Device, Guarded};

/// Sizes of a case.
#[derive(Debug, Clone, Copy)]
struct Case {
    float: Float,
    batch: usize,
    queries: usize,
    position: usize,
    kv_heads: usize,
    group: usize,
    dim: usize,
    window: Option<usize>,
    /// Positions of the cache behind the last key.
    room: usize,
    /// Largest magnitude of queries and keys.
    range: f32,
}

const PLAIN: Case = Case {
    float: Float::Bf16,
    batch: 1,
    queries: 1,
    position: 0,
    kv_heads: 1,
    group: 1,
    dim: 128,
    window: None,
    room: 3,
    range: 2.0,
};

/// A case's values on both sides. What no query may read is NaN.
struct Problem {
    case: Case,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    device_q: Rows,
    device_k: Guarded,
    device_v: Guarded,
    positions: Guarded,
    scratch: Guarded,
}

/// What is right, and what it may be off by.
struct Expected {
    value: f64,
    bound: f64,
}

impl Case {
    fn keys(&self) -> usize {
        self.position + self.queries
    }

    fn capacity(&self) -> usize {
        self.keys() + self.room
    }

    fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// The same case, and the type and dimension that its number gives it: all of them, in turn.
    fn numbered(self, number: usize) -> Self {
        Self {
            float: [Float::Bf16, Float::F16][number % 2],
            dim: [128, 64][number / 2 % 2],
            ..self
        }
    }
}

impl Problem {
    fn new(device: &Device, case: Case) -> Self {
        let mut random = Random((case.queries * 1009 + case.position * 31 + case.dim) as u64);
        let mut values = |count: usize, range: f32| -> Vec<f32> {
            (0..count)
                .map(|_| round(random.signed() * range, case.float))
                .collect()
        };
        let width = case.heads() * case.dim;
        let q = values(case.batch * case.queries * width, case.range);
        let filled = case.batch * case.kv_heads * case.keys() * case.dim;
        let (k, v) = (values(filled, case.range), values(filled, 3.0));
        let cache = |values: &[f32]| {
            let mut bytes = Vec::new();
            for head in values.chunks(case.keys() * case.dim) {
                bytes.extend(to_bytes(head, case.float));
                let room = case.room * case.dim * case.float.size();
                bytes.resize(bytes.len() + room, 0xff);
            }
            device.upload(&bytes)
        };
        let positions = (case.position as u32).to_le_bytes().repeat(case.batch);
        Self {
            case,
            device_q: Rows::new(device, &q, width, width + 16, case.float),
            device_k: cache(&k),
            device_v: cache(&v),
            positions: device.upload(&positions),
            scratch: device.upload(&vec![0; attention_scratch(device.gpu)]),
            q,
            k,
            v,
        }
    }

    fn args(&self, out: &Values, out_stride: usize) -> Attention {
        let case = self.case;
        let heads = |values: &Guarded| Heads {
            values: values.address,
            batch_stride: case.kv_heads * case.capacity() * case.dim,
            head_stride: case.capacity() * case.dim,
        };
        Attention {
            batch: case.batch,
            queries: case.queries,
            heads: case.heads(),
            kv_heads: case.kv_heads,
            dim: case.dim,
            positions: Positions::Known(case.position),
            capacity: case.capacity(),
            window: case.window,
            scale: 1.0 / (case.dim as f32).sqrt(),
            float: case.float,
            q: self.device_q.address(),
            q_stride: self.device_q.stride,
            keys: heads(&self.device_k),
            values: heads(&self.device_v),
            out: out.address(),
            out_stride,
            scratch: self.scratch.address,
            dependent: false,
        }
    }

    /// Runs a kernel; `change` has the last word on its arguments.
    fn run(
        &self,
        device: &Device,
        kernel: AttentionKernel,
        change: impl Fn(&mut Attention),
    ) -> Vec<f32> {
        let case = self.case;
        let (width, stride) = (case.heads() * case.dim, case.heads() * case.dim + 8);
        let out = Values::new(device, case.batch * case.queries, width, stride, case.float);
        let mut args = self.args(&out, stride);
        change(&mut args);
        // SAFETY: the memory is as large as the sizes say, and the scratch is zero.
        unsafe { cuda::attention_with(&device.stream, &args, kernel) }.unwrap();
        let found = out.get(device);
        self.device_q.assert_untouched(device);
        let counters = device.download(&self.scratch).unwrap();
        assert!(
            counters[..4096].iter().all(|&byte| byte == 0),
            "{kernel} {case:?}: counters are zero again"
        );
        found
    }

    fn expected(&self) -> Vec<Expected> {
        let case = self.case;
        let (q, k, v) = (widen(&self.q), widen(&self.k), widen(&self.v));
        let rows = case.batch * case.queries * case.heads();
        let of_row = |row: usize| {
            let (token, head) = (row / case.heads(), row % case.heads());
            let position = case.position + token % case.queries;
            let cache = token / case.queries * case.kv_heads + head / case.group;
            let from = (position + 1).saturating_sub(case.window.unwrap_or(usize::MAX));
            let at = |key: usize| (cache * case.keys() + key) * case.dim;
            let q = &q[row * case.dim..][..case.dim];
            let scale = f64::from(1.0 / (case.dim as f32).sqrt());
            let (mut scores, mut magnitude) = (Vec::new(), 0f64);
            for key in from..=position {
                let products = q.iter().zip(&k[at(key)..][..case.dim]);
                let products: Vec<f64> = products.map(|(q, k)| q * k * scale).collect();
                scores.push(products.iter().sum::<f64>());
                magnitude = magnitude.max(products.iter().map(|product| product.abs()).sum());
            }
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let total: f64 = weights.iter().sum();
            (0..case.dim)
                .map(|d| {
                    let (mut value, mut size, mut largest) = (0f64, 0f64, 0f64);
                    for (key, weight) in (from..=position).zip(&weights) {
                        let v = v[at(key) + d];
                        value += weight / total * v;
                        size += weight / total * v.abs();
                        largest = largest.max(v.abs());
                    }
                    let bound = self.bound(value, size, largest, magnitude, weights.len());
                    Expected { value, bound }
                })
                .collect::<Vec<_>>()
        };
        (0..rows).into_par_iter().flat_map_iter(of_row).collect()
    }

    /// Of a result that is the sum of weighted values whose magnitudes sum up to `size`, the largest of which is
    /// `largest`; `magnitude` is the largest sum of the magnitudes of a score's products.
    fn bound(&self, value: f64, size: f64, largest: f64, magnitude: f64, keys: usize) -> f64 {
        let (float, step) = (oracle_float(self.case.float), 2f64.powi(-23));
        let unit = float.unit_roundoff();
        // A score is a sum in f32, which tensor cores cut off instead of rounding; its exponential is off by as much,
        // relatively, and by the error of the instruction. Each of up to as many tiles as keys multiplies the sums once
        // more. All this is in the sum of weights, too.
        let score = magnitude * (self.case.dim as f64 + 8.0) * step;
        let weight = score + 4.0 * step;
        let sums = (keys as f64 + 8.0) * step;
        // Weights are rounded to the type of the values, for the numerator alone; small ones of F16 to a multiple of
        // its smallest number.
        let (rounding, smallest) = match self.case.float {
            Float::F32 => (0.0, 0.0),
            Float::Bf16 => (unit, 0.0),
            Float::F16 => (unit, 2f64.powi(-25)),
        };
        value.abs() * unit
            + size * (rounding + 2.0 * (weight + sums)) * 1.01
            + keys as f64 * smallest * largest
            + 1e-7
    }

    fn check(&self, kernel: AttentionKernel, found: &[f32], expected: &[Expected]) {
        let case = self.case;
        assert_eq!(found.len(), expected.len());
        for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected.value).abs();
            assert!(
                error <= expected.bound,
                "{kernel} {case:?}: {i} is {found:e}, not {:e} ± {:e}",
                expected.value,
                expected.bound
            );
        }
    }
}

/// Checks a case in each kernel that serves it, with the position known and on the device.
fn check(device: &Device, case: Case) {
    let problem = Problem::new(device, case);
    let expected = problem.expected();
    let on_device = Positions::OnDevice(problem.positions.address);
    let out = Values::new(device, 1, 1, 1, case.float);
    let mut args = problem.args(&out, problem.device_q.stride);
    for kernel in AttentionKernel::ALL {
        args.positions = Positions::Known(case.position);
        if !kernel.serves(device.gpu, &args) {
            continue;
        }
        let found = problem.run(device, kernel, |_| ());
        problem.check(kernel, &found, &expected);
        args.positions = on_device;
        if kernel.serves(device.gpu, &args) {
            let again = problem.run(device, kernel, |args| {
                args.positions = on_device;
                args.dependent = true;
            });
            assert!(found == again, "{kernel} {case:?}: on the device");
        }
    }
}

const GROUPS: [usize; 6] = [1, 4, 8, 3, 7, 5];

/// Few and small, for the sanitizers.
#[test]
fn each_kernel() {
    let Some(device) = Device::get() else { return };
    for (number, (queries, position)) in [(1, 300), (40, 100)].into_iter().enumerate() {
        let case = Case {
            queries,
            position,
            group: 4,
            window: Some(270),
            room: 700,
            ..PLAIN
        };
        check(&device, case.numbered(number));
        check(&device, case.numbered(3 - number));
    }
}

/// Every remainder of what lanes, warps and tiles handle at once.
#[test]
fn all_remainders() {
    let Some(device) = Device::get() else { return };
    let positions = [0, 1, 7, 15, 16, 31, 63, 64, 65, 127, 128, 129, 300];
    let queries = (1..=18).chain([31, 33, 63, 64, 65, 100, 127, 128, 129, 150]);
    for (number, queries) in queries.enumerate() {
        let case = Case {
            queries,
            position: positions[number % positions.len()],
            kv_heads: 1 + number % 2,
            group: GROUPS[number % GROUPS.len()],
            room: number % 4,
            ..PLAIN
        };
        check(&device, case.numbered(number));
        check(&device, Case { group: 4, ..case }.numbered(number + 2));
    }
    for (number, position) in (1..=40).chain(120..=136).enumerate() {
        let case = Case {
            position,
            group: GROUPS[number % GROUPS.len()],
            ..PLAIN
        };
        check(&device, case.numbered(number / 2));
    }
}

#[test]
fn groups_and_batches() {
    let Some(device) = Device::get() else { return };
    for (number, group) in GROUPS.into_iter().chain([16, 71, 128, 130]).enumerate() {
        for (queries, position) in [(1, 200), (3, 70), (40, 0), (33, 100)] {
            let case = Case {
                batch: 1 + number % 3,
                queries,
                position,
                kv_heads: 2,
                group,
                ..PLAIN
            };
            check(&device, case.numbered(number + queries));
        }
    }
}

/// More keys than one block takes, split among many and among fewer than the cache has room for.
#[test]
fn many_keys() {
    let Some(device) = Device::get() else { return };
    for (number, position) in [1000, 2047, 2048, 5000].into_iter().enumerate() {
        for (queries, group) in [(1, 4), (1, 8), (5, 4), (16, 1)] {
            for room in [0, 20_000] {
                let case = Case {
                    queries,
                    position,
                    kv_heads: 2,
                    group,
                    room,
                    ..PLAIN
                };
                check(&device, case.numbered(number));
                check(&device, case.numbered(number + 2));
            }
        }
    }
}

/// So many tiles that blocks of a persistent kernel take several.
#[test]
fn many_queries() {
    let Some(device) = Device::get() else { return };
    for (number, (queries, position)) in [(700, 0), (520, 333)].into_iter().enumerate() {
        let case = Case {
            batch: 2,
            queries,
            position,
            kv_heads: 4,
            group: 4,
            ..PLAIN
        };
        check(&device, case.numbered(number));
        check(&device, case.numbered(3 - number));
    }
}

#[test]
fn windows() {
    let Some(device) = Device::get() else { return };
    for (number, window) in [1, 2, 40, 64, 100, 129, 5000].into_iter().enumerate() {
        for (queries, position) in [(1, 0), (1, 300), (4, 700), (150, 0), (140, 260)] {
            let case = Case {
                queries,
                position,
                group: GROUPS[number % GROUPS.len()],
                window: Some(window),
                ..PLAIN
            };
            check(&device, case.numbered(number + queries));
        }
    }
}

#[test]
fn any_dimension_and_type() {
    let Some(device) = Device::get() else { return };
    for dim in [1, 2, 16, 24, 32, 64, 80, 96, 100, 128, 200, 256, 512] {
        for float in [Float::Bf16, Float::F16, Float::F32] {
            for (queries, position) in [(1, 150), (20, 5)] {
                let case = Case {
                    float,
                    queries,
                    position,
                    kv_heads: 2,
                    group: 2,
                    dim,
                    ..PLAIN
                };
                check(&device, case);
            }
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let Some(device) = Device::get() else { return };
    for (queries, position) in [(1, 700), (140, 200)] {
        for number in 0..4 {
            let case = Case {
                queries,
                position,
                group: 4,
                range: 30.0,
                ..PLAIN
            };
            check(&device, case.numbered(number));
        }
    }
}

/// A captured graph runs the same launch for each next token.
#[test]
fn positions_move_on_the_device() {
    let Some(device) = Device::get() else { return };
    let long = Case {
        queries: 2,
        position: 800,
        kv_heads: 2,
        group: 4,
        ..PLAIN
    };
    let problem = Problem::new(&device, long);
    let capacity = long.capacity();
    for position in [0usize, 1, 63, 127, 128, 400, 799] {
        let bytes = (position as u32).to_le_bytes();
        let on_device = device.upload(&bytes);
        for kernel in [
            AttentionKernel::FewRows,
            AttentionKernel::ManyRows,
            AttentionKernel::Any,
        ] {
            let known = problem.run(&device, kernel, |args| {
                args.positions = Positions::Known(position);
            });
            let found = problem.run(&device, kernel, |args| {
                args.positions = Positions::OnDevice(on_device.address);
            });
            assert!(known == found, "{kernel} at {position}");
        }
    }
    // What does not fit is taken for the last that does.
    let far = device.upload(&u32::MAX.to_le_bytes());
    let filled = Case {
        position: capacity - 2,
        room: 0,
        ..long
    };
    let problem = Problem::new(&device, filled);
    let known = problem.run(&device, AttentionKernel::FewRows, |_| ());
    let found = problem.run(&device, AttentionKernel::FewRows, |args| {
        args.positions = Positions::OnDevice(far.address);
    });
    assert!(known == found && known.iter().all(|y| y.is_finite()));
}

/// Blocks finish in any order; what they found is added up in one.
#[test]
fn results_do_not_depend_on_the_order_of_blocks() {
    let Some(device) = Device::get() else { return };
    let case = Case {
        position: 5000,
        kv_heads: 8,
        group: 4,
        ..PLAIN
    };
    let problem = Problem::new(&device, case);
    let first = problem.run(&device, AttentionKernel::FewRows, |_| ());
    for _ in 0..20 {
        let again = problem.run(&device, AttentionKernel::FewRows, |_| ());
        assert!(first == again);
    }
}

#[test]
fn not_a_number_reaches_those_that_see_it() {
    let Some(device) = Device::get() else { return };
    for (queries, position) in [(1, 700), (300, 600)] {
        for key in [true, false] {
            let case = Case {
                queries,
                position,
                kv_heads: 2,
                group: 2,
                ..PLAIN
            };
            let mut problem = Problem::new(&device, case);
            let side = if key { &mut problem.k } else { &mut problem.v };
            // The last key of the first head.
            let at = (case.keys() - 1) * case.dim;
            side[at..at + case.dim].fill(f32::NAN);
            let mut bytes = Vec::new();
            for head in side.chunks(case.keys() * case.dim) {
                bytes.extend(to_bytes(head, case.float));
                bytes.resize(bytes.len() + case.room * case.dim * 2, 0xff);
            }
            let side = match key {
                true => &mut problem.device_k,
                false => &mut problem.device_v,
            };
            *side = device.upload(&bytes);
            for kernel in AttentionKernel::ALL {
                if kernel == AttentionKernel::Sm90 && !device.gpu.is_hopper() {
                    continue;
                }
                let found = problem.run(&device, kernel, |_| ());
                let last = found.len() - 4 * case.dim;
                let (first_head, second_head) = found[last..].split_at(2 * case.dim);
                assert!(first_head.iter().all(|y| y.is_nan()), "{kernel}");
                assert!(second_head.iter().all(|y| y.is_finite()), "{kernel}");
                assert!(
                    queries == 1 || found[..8 * case.dim].iter().all(|y| y.is_finite()),
                    "{kernel}"
                );
            }
        }
    }
}
