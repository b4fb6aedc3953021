//! A step of a model of two layers, embedding and `lm_head`, as a graph that is replayed with no work on the host.

use candle_kernels_fp8::cuda::{self, Argmax, DenseMm, Embed, Float, argmax_scratch};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use crate::rows::{POISON, Rows, Values};
use crate::support_cuda::{Device, Guarded};

/// Several parts for argmax, and a last tile that is not whole.
const VOCAB: usize = 9001;
const DIM: usize = 64;
const BATCH: usize = 3;

/// What follows a token: each has its own.
fn next(id: u32) -> u32 {
    (id * 7 + 3) % VOCAB as u32
}

/// Bits of an id as signs: the product with another's row is smaller by 8 for each bit in which they differ.
fn row(id: u32) -> Vec<f32> {
    let sign = |at: usize| if id >> (at % 16) & 1 == 1 { 1.0 } else { -1.0 };
    (0..DIM).map(sign).collect()
}

struct Model {
    table: Rows,
    weight: Rows,
    hidden: Values,
    logits: Values,
    /// Of the next step.
    input: Guarded,
    ids: Guarded,
    positions: Guarded,
    unknown: Guarded,
    scratch: Guarded,
}

impl Model {
    fn new(device: &Device, first: [u32; BATCH]) -> Self {
        let rows: Vec<Vec<f32>> = (0..VOCAB as u32).map(row).collect();
        let mut followers = rows.clone();
        for (id, row) in (0..).zip(&rows) {
            followers[next(id) as usize] = row.clone();
        }
        let words = |words: [u32; BATCH]| device.upload(&words.map(u32::to_le_bytes).concat());
        Self {
            table: Rows::new(device, &rows.concat(), DIM, DIM, Float::Bf16),
            weight: Rows::new(device, &followers.concat(), DIM, DIM, Float::Bf16),
            hidden: Values::new(device, BATCH, DIM, DIM, Float::Bf16),
            logits: Values::new(device, BATCH, VOCAB, VOCAB, Float::F32),
            input: words(first),
            ids: device.upload(&[POISON; BATCH * 4]),
            positions: words([0, 10, 200]),
            unknown: device.upload(&[0; 4]),
            scratch: device.upload(&vec![0; argmax_scratch(BATCH)]),
        }
    }

    /// One step. Its first launch waits for the step before it.
    fn step(&self, device: &Device, dependent: bool) {
        let embed = Embed {
            n: BATCH,
            vocab: VOCAB,
            dim: DIM,
            table: self.table.address(),
            float: Float::Bf16,
            ids: self.input.address,
            out: self.hidden.address(),
            out_float: Float::Bf16,
            unknown: Some(self.unknown.address),
            dependent: false,
        };
        let dense_mm = DenseMm {
            m: BATCH,
            n: VOCAB,
            k: DIM,
            x: self.hidden.address(),
            row_stride: DIM,
            weight: self.weight.address(),
            weight_stride: DIM,
            float: Float::Bf16,
            bias: None,
            out: self.logits.address(),
            out_float: Float::F32,
            dependent,
        };
        let argmax = Argmax {
            batch: BATCH,
            vocab: VOCAB,
            logits: self.logits.address(),
            row_stride: VOCAB,
            float: Float::F32,
            ids: self.ids.address,
            next: Some(self.input.address),
            positions: Some(self.positions.address),
            not_finite: None,
            scratch: self.scratch.address,
            dependent,
        };
        // SAFETY: the memory is as large as the sizes say; weights are written before the first step.
        unsafe {
            cuda::embed(&device.stream, &embed).unwrap();
            cuda::dense_mm(&device.stream, &dense_mm).unwrap();
            cuda::argmax(&device.stream, &argmax).unwrap();
        }
    }

    fn capture(&self, device: &Device) -> CudaGraph {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        device.stream.begin_capture(mode).unwrap();
        self.step(device, true);
        // SAFETY: zero is "no flags".
        let flags: CUgraphInstantiate_flags = unsafe { std::mem::transmute(0u32) };
        device.stream.end_capture(flags).unwrap().unwrap()
    }
}

fn words(device: &Device, memory: &Guarded) -> Vec<u32> {
    let bytes = device.download(memory).unwrap();
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(4).map(word).collect()
}

#[test]
fn each_kernel() {
    let Some(device) = Device::get() else { return };
    let mut expected = [1, 5000, 9000];
    let model = Model::new(&device, expected);
    for step in 1..4 {
        model.step(&device, step % 2 == 0);
        expected = expected.map(next);
        assert_eq!(words(&device, &model.ids), expected, "step {step}");
        assert_eq!(
            words(&device, &model.positions),
            [step, 10 + step, 200 + step]
        );
    }
}

#[test]
fn a_graph_goes_on_by_itself() {
    let Some(device) = Device::get() else { return };
    let mut expected = [0, 4097, 8999];
    let model = Model::new(&device, expected);
    // Loads the kernels, which a capture must not do.
    model.step(&device, true);
    expected = expected.map(next);
    let graph = model.capture(&device);
    let mut steps = 1;
    for replays in [1, 1, 2, 100, 1000] {
        for _ in 0..replays {
            graph.launch().unwrap();
            expected = expected.map(next);
        }
        steps += replays;
        assert_eq!(words(&device, &model.ids), expected, "step {steps}");
        assert_eq!(words(&device, &model.input), expected, "step {steps}");
        assert_eq!(
            words(&device, &model.positions),
            [steps, 10 + steps, 200 + steps]
        );
    }
    assert_eq!(words(&device, &model.unknown), [0]);
}

/// The host learns of an id that does not exist, and the other sequences do not.
#[test]
fn an_unknown_id_is_told() {
    let Some(device) = Device::get() else { return };
    let model = Model::new(&device, [7, u32::MAX, 8]);
    model.step(&device, true);
    assert_eq!(words(&device, &model.unknown), [1]);
    assert_eq!(words(&device, &model.ids), [next(7), 0, next(8)]);
    let logits = model.logits.get(&device);
    for (row, logits) in logits.chunks(VOCAB).enumerate() {
        assert!(logits.iter().all(|y| y.is_nan() == (row == 1)), "row {row}");
    }
}
