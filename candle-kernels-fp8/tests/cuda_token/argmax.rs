//! Greedy choice: the index that folding from the first logit on with `x < y` gives, as Candle does on the CPU.

use candle_kernels_fp8::cuda::{self, Argmax, Float, argmax_scratch};

use crate::lengths;
use crate::oracle::cases::Random;
use crate::rows::{FLOATS, POISON, Rows, round};
use crate::support_cuda::{Device, Guarded};

/// As Candle folds.
fn expected(logits: &[f32]) -> u32 {
    let (mut most, mut at) = (logits[0], 0);
    for (i, &logit) in logits.iter().enumerate() {
        if most < logit {
            (most, at) = (logit, i);
        }
    }
    at as u32
}

fn words(device: &Device, memory: &Guarded) -> Vec<u32> {
    let bytes = device.download(memory).unwrap();
    let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(4).map(word).collect()
}

fn upload(device: &Device, words: &[u32]) -> Guarded {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    device.upload(&bytes)
}

/// Scratch for so many sequences, as it is before its first use.
fn scratch(device: &Device, batch: usize) -> Guarded {
    device.upload(&vec![0; argmax_scratch(batch)])
}

/// Where a case's rows are.
#[derive(Debug, Clone, Copy)]
struct Place {
    float: Float,
    stride: usize,
    shift: usize,
}

fn check(device: &Device, scratch: &Guarded, logits: &[Vec<f32>], place: Place, dependent: bool) {
    let (batch, vocab) = (logits.len(), logits[0].len());
    let Place {
        float,
        stride,
        shift,
    } = place;
    let all: Vec<f32> = logits.concat();
    let rows = Rows::shifted(device, &all, (vocab, stride), float, shift);
    let expected: Vec<u32> = logits.iter().map(|row| expected(row)).collect();
    let before: Vec<u32> = (0..batch as u32).map(|row| row * 1000).collect();
    let after: Vec<u32> = before.iter().map(|position| position + 1).collect();
    let finite = all.iter().all(|logit| logit.is_finite());
    // Each optional result with and without the others.
    for (wants_next, wants_positions, wants_flag) in [
        (true, true, true),
        (false, true, false),
        (true, false, true),
    ] {
        let poison = vec![POISON; batch * 4];
        let (ids, next) = (device.upload(&poison), device.upload(&poison));
        let positions = upload(device, &before);
        let not_finite = upload(device, &[0]);
        let args = Argmax {
            batch,
            vocab,
            logits: rows.address(),
            row_stride: stride,
            float,
            ids: ids.address,
            next: wants_next.then_some(next.address),
            positions: wants_positions.then_some(positions.address),
            not_finite: wants_flag.then_some(not_finite.address),
            scratch: scratch.address,
            dependent,
        };
        // SAFETY: the memory is as large as the sizes say.
        unsafe { cuda::argmax(&device.stream, &args) }.unwrap();
        let what = format!("{batch} of {vocab}, {place:?}");
        assert_eq!(words(device, &ids), expected, "{what}");
        match wants_next {
            true => assert_eq!(words(device, &next), expected, "{what}: next"),
            false => assert_eq!(device.download(&next).unwrap(), poison, "{what}: next"),
        }
        let positions = words(device, &positions);
        let moved = if wants_positions { &after } else { &before };
        assert_eq!(&positions, moved, "{what}: positions");
        let flag = u32::from(wants_flag && !finite);
        assert_eq!(words(device, &not_finite), [flag], "{what}: not finite");
    }
    rows.assert_untouched(device);
}

fn rows(batch: usize, vocab: usize, float: Float, seed: u64) -> Vec<Vec<f32>> {
    let mut random = Random(seed);
    let row = |_| -> Vec<f32> {
        (0..vocab)
            .map(|_| round(random.signed() * 20.0, float))
            .collect()
    };
    (0..batch).map(row).collect()
}

/// Few and small, for the sanitizers. The larger ones are of several parts.
#[test]
fn each_kernel() {
    let Some(device) = Device::get() else { return };
    let scratch = scratch(&device, 3);
    for float in FLOATS {
        for (vocab, shift) in [(1, 0), (100, 0), (9000, 0), (9001, 3)] {
            let place = Place {
                float,
                stride: vocab,
                shift,
            };
            check(&device, &scratch, &rows(3, vocab, float, 1), place, true);
        }
    }
}

#[test]
fn all_lengths() {
    let Some(device) = Device::get() else { return };
    let scratch = scratch(&device, 40);
    let more = [
        4095, 4097, 8191, 8193, 32_000, 50_257, 128_256, 151_936, 262_144, 300_001,
    ];
    for vocab in lengths().into_iter().chain(more) {
        for float in FLOATS {
            let batch = [1, 2, 3, 40][vocab % 4].min(1 + 400_000 / vocab);
            let padded = vocab.next_multiple_of(8) + 8 * (vocab % 3);
            for (stride, shift) in [(padded, 0), (vocab, vocab % 8), (vocab + 1, 0)] {
                let place = Place {
                    float,
                    stride,
                    shift,
                };
                let logits = rows(batch, vocab, float, (vocab + batch) as u64);
                check(&device, &scratch, &logits, place, vocab % 2 == 0);
            }
        }
    }
}

/// The largest one at places on both sides of each bound of threads, warps and blocks, and then two equal ones.
#[test]
fn the_first_of_equals_wherever_it_is() {
    let Some(device) = Device::get() else { return };
    let scratch = scratch(&device, 64);
    let vocab = 20_003usize;
    let places = [
        0, 1, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 3999, 4000, 4001, 4002, 4008, 4095, 4096,
        4097, 8002, 8008, 12_008, 16_007, 19_999, 20_000, 20_001, 20_002,
    ];
    for float in FLOATS {
        for (stride, shift) in [(vocab, 1), (vocab.next_multiple_of(8), 0)] {
            let place = Place {
                float,
                stride,
                shift,
            };
            let largest = |at: &[usize]| {
                let mut row = rows(1, vocab, float, at[0] as u64).remove(0);
                for &at in at {
                    row[at] = 21.0;
                }
                row
            };
            let alone: Vec<Vec<f32>> = places.iter().map(|&at| largest(&[at])).collect();
            check(&device, &scratch, &alone, place, false);
            let pairs = places.windows(2).chain(places.windows(9));
            let pairs: Vec<Vec<f32>> = pairs.map(largest).collect();
            check(&device, &scratch, &pairs, place, false);
        }
    }
}

#[test]
fn special_values() {
    let Some(device) = Device::get() else { return };
    let scratch = scratch(&device, 16);
    for vocab in [1, 5, 64, 4096, 9000, 30_005] {
        for float in FLOATS {
            let with = |fill: f32, at: &[(usize, f32)]| {
                let mut row = vec![fill; vocab];
                for &(at, value) in at {
                    row[at.min(vocab - 1)] = value;
                }
                row
            };
            let last = vocab - 1;
            let logits = vec![
                with(0.0, &[]),
                // Zeros are equal, whatever their sign.
                with(-0.0, &[(last, 0.0)]),
                with(0.0, &[(0, -0.0)]),
                with(-1.0, &[(last, -0.0)]),
                with(f32::NEG_INFINITY, &[]),
                with(f32::NEG_INFINITY, &[(last, -60000.0)]),
                with(0.0, &[(last / 2, f32::INFINITY), (last, f32::INFINITY)]),
                // A NaN is passed over, but for the first.
                with(f32::NAN, &[]),
                with(0.0, &[(0, f32::NAN), (last, 5.0)]),
                with(f32::NEG_INFINITY, &[(0, f32::NAN)]),
                with(0.0, &[(1, f32::NAN), (last, 5.0)]),
                with(f32::NAN, &[(0, -5.0), (last, 5.0)]),
                with(f32::NAN, &[(0, f32::NEG_INFINITY)]),
                with(f32::NAN, &[(0, f32::NEG_INFINITY), (last, -5.0)]),
                with(-5.0, &[(last, -f32::NAN)]),
                // Subnormal.
                with(0.0, &[(last, 6e-8)]),
            ];
            let place = Place {
                float,
                stride: vocab,
                shift: 0,
            };
            let logits: Vec<Vec<f32>> = logits
                .into_iter()
                .map(|row| row.into_iter().map(|x| round(x, float)).collect())
                .collect();
            check(&device, &scratch, &logits, place, false);
        }
    }
}

/// A logit that is not finite is noticed wherever it is, and its flag stays until the host clears it.
#[test]
fn what_is_not_finite_is_noticed() {
    let Some(device) = Device::get() else { return };
    let scratch = scratch(&device, 2);
    for vocab in [1, 9, 4097, 9001, 128_256] {
        let place = Place {
            float: Float::F32,
            stride: vocab,
            shift: 0,
        };
        for at in [0, vocab / 3, vocab / 2, vocab - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut logits = rows(2, vocab, Float::F32, at as u64);
                logits[1][at] = bad;
                check(&device, &scratch, &logits, place, true);
            }
        }
    }
    let (logits, ids) = (upload(&device, &[0]), upload(&device, &[0]));
    let flag = upload(&device, &[1]);
    let args = Argmax {
        batch: 1,
        vocab: 1,
        logits: logits.address,
        row_stride: 1,
        float: Float::F32,
        ids: ids.address,
        next: None,
        positions: None,
        not_finite: Some(flag.address),
        scratch: scratch.address,
        dependent: false,
    };
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::argmax(&device.stream, &args) }.unwrap();
    assert_eq!(words(&device, &flag), [1]);
}

/// The scratch is as before after each call, whatever the sizes of the next one.
#[test]
fn scratch_is_shared() {
    let Some(device) = Device::get() else { return };
    let scratch = scratch(&device, 32);
    for turn in 0..50 {
        let batch = 1 + turn * 7 % 32;
        let vocab = [10, 5000, 128_256, 40_000][turn % 4];
        let place = Place {
            float: Float::F32,
            stride: vocab,
            shift: 0,
        };
        let logits = rows(batch, vocab, Float::F32, turn as u64);
        check(&device, &scratch, &logits, place, true);
    }
}
