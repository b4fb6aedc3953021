//! RoPE and the cache: as the CPU's functions do it one after the other.

use candle_kernels_fp8::cpu::{self, InstructionSet};
use candle_kernels_fp8::cuda::{self, Float, HeadNorms, Heads, Positions, RmsNorm, RopeAppend};
use half::{bf16, f16};

use crate::oracle::cases::Random;
use crate::rows::{FLOATS, POISON, Rows, Values, assert_same, from_bytes, round, to_bytes};
use crate::support_cuda::Device;

/// Sizes of a case.
#[derive(Debug, Clone, Copy)]
struct Case {
    float: Float,
    batch: usize,
    len: usize,
    position: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    norms: bool,
    /// Whether q, k and v are parts of one row.
    merged: bool,
    /// Whether the queries are rotated where they are.
    in_place: bool,
    /// Position of the first angle.
    first_angle: usize,
}

const PLAIN: Case = Case {
    float: Float::Bf16,
    batch: 1,
    len: 1,
    position: 5,
    heads: 8,
    kv_heads: 2,
    dim: 128,
    norms: false,
    merged: true,
    in_place: false,
    first_angle: 0,
};

const EPS: f32 = 1e-5;
/// Positions of the cache, beyond those of a case.
const ROOM: usize = 3;

/// `rope` of the CPU on `[batch, len, heads, dim]`.
fn rope_on_cpu(case: &Case, heads: usize, x: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    fn run<T: cpu::Element>(
        sizes: (usize, usize, usize),
        slices: [&[f32]; 3],
        narrow: impl Fn(f32) -> T,
    ) -> Vec<f32> {
        let [x, cos, sin] =
            slices.map(|values| values.iter().map(|&x| narrow(x)).collect::<Vec<T>>());
        let mut out = Vec::new();
        cpu::rope(InstructionSet::best(), sizes, &x, &cos, &sin, &mut out);
        out.iter().map(|y| y.to_f32()).collect()
    }
    let sizes = (case.len, heads, case.dim);
    match case.float {
        Float::Bf16 => run(sizes, [x, cos, sin], bf16::from_f32),
        Float::F16 => run(sizes, [x, cos, sin], f16::from_f32),
        Float::F32 => run(sizes, [x, cos, sin], |x| x),
    }
}

fn values(random: &mut Random, count: usize, range: f32, float: Float) -> Vec<f32> {
    (0..count)
        .map(|_| round(random.signed() * range, float))
        .collect()
}

/// `[batch, len, heads, dim]` as a cache of `[batch, heads, capacity, dim]` receives them; the rest is poison.
fn in_cache(case: &Case, x: &[f32], capacity: usize) -> Vec<u8> {
    let (row, size) = (case.dim, case.float.size());
    let mut bytes = vec![POISON; case.batch * case.kv_heads * capacity * row * size];
    for (index, x) in x.chunks(row).enumerate() {
        let (token, head) = (index / case.kv_heads, index % case.kv_heads);
        let (sequence, at) = (token / case.len, case.position + token % case.len);
        let to = ((sequence * case.kv_heads + head) * capacity + at) * row * size;
        bytes[to..to + row * size].copy_from_slice(&to_bytes(x, case.float));
    }
    bytes
}

fn check(device: &Device, case: Case, positions: impl Fn(usize) -> Positions, dependent: bool) {
    let Case { float, dim, .. } = case;
    let (tokens, half) = (case.batch * case.len, dim / 2);
    let widths = [case.heads * dim, case.kv_heads * dim, case.kv_heads * dim];
    let mut random = Random((case.dim * 31 + case.len) as u64);
    let parts = widths.map(|width| values(&mut random, tokens * width, 4.0, float));
    // Rows of one buffer, or three buffers with something between rows.
    let (memories, offsets, strides): (Vec<Rows>, [usize; 3], [usize; 3]) = match case.merged {
        true => {
            let width: usize = widths.iter().sum();
            let rows: Vec<f32> = (0..tokens)
                .flat_map(|token| {
                    let part = |i: usize| parts[i][token * widths[i]..][..widths[i]].to_vec();
                    [part(0), part(1), part(2)].concat()
                })
                .collect();
            let memory = Rows::new(device, &rows, width, width + 8, float);
            let offsets = [0, widths[0], widths[0] + widths[1]];
            (vec![memory], offsets, [width + 8; 3])
        }
        false => {
            let rows = |i: usize| Rows::new(device, &parts[i], widths[i], widths[i] + 8 * i, float);
            let strides = [widths[0], widths[1] + 8, widths[2] + 16];
            ((0..3).map(rows).collect(), [0; 3], strides)
        }
    };
    let address = |i: usize| {
        let memory = &memories[if case.merged { 0 } else { i }];
        memory.address() + (offsets[i] * float.size()) as u64
    };
    let capacity = case.position + case.len + ROOM;
    let angles = (capacity - case.first_angle) * half;
    let cos = values(&mut random, angles, 1.0, float);
    let sin = values(&mut random, angles, 1.0, float);
    let weights = [1.5, 2.5].map(|range| values(&mut random, dim, range, float));
    let device_angles = [&cos, &sin].map(|angles| Rows::new(device, angles, half, half, float));
    let device_weights = weights
        .each_ref()
        .map(|w| Rows::new(device, w, dim, dim, float));
    let poison = vec![POISON; case.batch * case.kv_heads * capacity * dim * float.size()];
    let caches = [device.upload(&poison), device.upload(&poison)];
    let q_out = Values::new(device, tokens, widths[0], widths[0] + 8, float);
    let heads = |i: usize| Heads {
        values: caches[i].address,
        batch_stride: case.kv_heads * capacity * dim,
        head_stride: capacity * dim,
    };
    let (q_to, q_out_stride) = match case.in_place {
        true => (address(0), strides[0]),
        false => (q_out.address(), widths[0] + 8),
    };
    let args = RopeAppend {
        batch: case.batch,
        len: case.len,
        heads: case.heads,
        kv_heads: case.kv_heads,
        dim,
        positions: positions(case.position),
        capacity,
        float,
        q: address(0),
        q_stride: strides[0],
        k: address(1),
        k_stride: strides[1],
        v: address(2),
        v_stride: strides[2],
        norms: case.norms.then(|| HeadNorms {
            q_weight: device_weights[0].address(),
            k_weight: device_weights[1].address(),
            eps: EPS,
        }),
        cos: device_angles[0].address(),
        sin: device_angles[1].address(),
        first_angle: case.first_angle,
        q_out: q_to,
        q_out_stride,
        keys: heads(0),
        values: heads(1),
        dependent,
    };
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::rope_append(&device.stream, &args) }.unwrap();

    let span = (case.position - case.first_angle) * half..;
    let (cos, sin) = (
        &cos[span.clone()][..case.len * half],
        &sin[span][..case.len * half],
    );
    let rotated = [0, 1].map(|i| {
        let normed = match case.norms {
            true => normed(device, &parts[i], &weights[i], dim, float),
            false => parts[i].clone(),
        };
        rope_on_cpu(&case, widths[i] / dim, &normed, cos, sin)
    });
    let what = format!("{case:?}");
    let near = |found: &[f32], expected: &[f32]| match case.norms {
        // Squares are added in another order than by the kernel for rows: now and then a neighbour, before the
        // rotation.
        true => assert_near(found, expected, float, &what),
        false => assert_same(found, expected, &what),
    };
    if !case.in_place {
        near(&q_out.get(device), &rotated[0]);
        for memory in &memories {
            memory.assert_untouched(device);
        }
    } else {
        let found = memories[0].download(device);
        let stride = strides[0];
        let rows = found
            .chunks(stride)
            .flat_map(|row| row[..widths[0]].to_vec());
        near(&rows.collect::<Vec<f32>>(), &rotated[0]);
    }
    let keys = device.download(&caches[0]).unwrap();
    let expected = in_cache(&case, &rotated[1], capacity);
    near(&from_bytes(&keys, float), &from_bytes(&expected, float));
    let found = device.download(&caches[1]).unwrap();
    assert!(
        found == in_cache(&case, &parts[2], capacity),
        "{what}: values"
    );
}

/// RMS norm by the kernel for rows, which has tests of its own.
fn normed(device: &Device, x: &[f32], weight: &[f32], k: usize, float: Float) -> Vec<f32> {
    let m = x.len() / k;
    let rows = Rows::new(device, x, k, k, float);
    let weight = Rows::new(device, weight, k, k, float);
    let out = Values::new(device, m, k, k, float);
    let args = RmsNorm {
        m,
        k,
        x: rows.address(),
        row_stride: k,
        residual: None,
        weight: weight.address(),
        eps: EPS,
        float,
        out: out.output(),
        dependent: false,
    };
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::rms_norm(&device.stream, &args) }.unwrap();
    out.get(device)
}

/// The same, but for a step of the type of either of two values of up to 16 that were added; few differ at all.
fn assert_near(found: &[f32], expected: &[f32], float: Float, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let step = match float {
        Float::Bf16 => 2f32.powi(-7),
        Float::F16 => 2f32.powi(-10),
        Float::F32 => 2f32.powi(-20),
    };
    let mut differ = 0;
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits();
        differ += usize::from(!same);
        let near = (found - expected).abs() <= 16.0 * step;
        assert!(near, "{what}: {i} is {found:e}, not {expected:e}");
    }
    let rare = float == Float::F32 || differ * 50 <= found.len() + 50;
    assert!(rare, "{what}: {differ} of {} differ", found.len());
}

/// Few and small, for the sanitizers.
#[test]
fn each_kernel() {
    let Some(device) = Device::get() else { return };
    for (dim, norms) in [(64, true), (24, true), (128, false)] {
        let case = Case {
            len: 3,
            dim,
            norms,
            in_place: norms,
            ..PLAIN
        };
        check(&device, case, Positions::Known, true);
    }
}

#[test]
fn all_dimensions_and_types() {
    let Some(device) = Device::get() else { return };
    for dim in [2, 16, 24, 32, 48, 64, 80, 96, 100, 128, 192, 256, 512] {
        for float in FLOATS {
            for (norms, merged) in [(false, true), (true, false), (false, false), (true, true)] {
                let case = Case {
                    float,
                    len: 3,
                    dim,
                    norms,
                    merged,
                    in_place: dim % 32 == 0,
                    ..PLAIN
                };
                check(&device, case, Positions::Known, false);
            }
        }
    }
}

#[test]
fn heads_and_batches() {
    let Some(device) = Device::get() else { return };
    for (heads, kv_heads) in [(1, 1), (4, 1), (32, 8), (9, 3), (14, 2)] {
        for (batch, len) in [(1, 1), (1, 2), (3, 1), (2, 7), (1, 100)] {
            for norms in [false, true] {
                let case = Case {
                    batch,
                    len,
                    heads,
                    kv_heads,
                    norms,
                    dim: if len % 2 == 0 { 64 } else { 128 },
                    first_angle: len % 3,
                    ..PLAIN
                };
                check(&device, case, Positions::Known, len % 2 == 1);
            }
        }
    }
}

#[test]
fn positions_are_on_the_device() {
    let Some(device) = Device::get() else { return };
    for position in [0, 1, 100, 1000] {
        for batch in [1, 3] {
            let case = Case {
                batch,
                position,
                ..PLAIN
            };
            let bytes = (position as u32).to_le_bytes().repeat(batch);
            let memory = device.upload(&bytes);
            let on_device = |_| Positions::OnDevice(memory.address);
            check(&device, case, on_device, true);
        }
    }
}
