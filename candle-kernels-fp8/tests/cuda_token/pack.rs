//! Weights moved into panels and back: as a plain loop over all codes does it.

use candle_kernels_fp8::cuda::{self, Panels};

use crate::oracle::cases::Random;
use crate::rows::POISON;
use crate::support_cuda::Device;

/// In panels, what rows of `stride` bytes hold.
fn packed(rows: &[u8], stride: usize, panels: Panels) -> Vec<u8> {
    let mut packed = vec![0; panels.len()];
    for row in 0..panels.n {
        for column in 0..panels.k {
            packed[panels.place(row, column)] = rows[row * stride + column];
        }
    }
    packed
}

/// Packs rows that start `shift` bytes past a multiple of 16, and unpacks them to others that start there.
fn check(device: &Device, panels: Panels, stride: usize, shift: usize, seed: u64) {
    let Panels { n, k } = panels;
    let what = format!("{n} rows of {k}, stride {stride}, {shift} bytes on");
    let mut random = Random(seed);
    let mut bytes: Vec<u8> = (0..shift + n * stride)
        .map(|_| random.bits() as u8)
        .collect();
    // Nothing follows the last row.
    bytes.truncate(shift + (n * stride + k).saturating_sub(stride));
    let rows = device.upload(&bytes);
    let to = device.upload(&vec![POISON; panels.len()]);
    let (stream, from) = (&device.stream, (rows.address + shift as u64, stride));
    let dependent = device.gpu.launches_dependents() && seed % 2 == 1;
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::pack(stream, from, to.address, panels, dependent) }.unwrap();
    let found = device.download(&to).unwrap();
    let expected = packed(&bytes[shift..], stride, panels);
    let wrong = (0..found.len()).find(|&at| found[at] != expected[at]);
    assert_eq!(wrong, None, "{what}: first wrong byte of the panels");

    let back = device.upload(&vec![POISON; bytes.len()]);
    let into = (back.address + shift as u64, stride);
    // SAFETY: as above.
    unsafe { cuda::unpack(stream, to.address, into, panels, dependent) }.unwrap();
    let found = device.download(&back).unwrap();
    for (at, &found) in found.iter().enumerate() {
        let of_row = at >= shift && (at - shift) % stride < k;
        let expected = if of_row { bytes[at] } else { POISON };
        assert_eq!(found, expected, "{what}: byte {at} of the rows");
    }
}

/// Every remainder of the rows of a panel, of the codes of an atom, and of the alignment of rows.
#[test]
fn weights_are_packed() {
    let Some(device) = Device::get() else { return };
    let (mut seed, mut sizes) = (0, Vec::<(usize, usize)>::new());
    sizes.extend((1..=9).flat_map(|n| [1, 15, 16, 127, 128, 129, 200].map(|k| (n, k))));
    sizes.extend((1..=257).map(|k| (11, k)));
    // More than a block moves of a panel, and many panels.
    sizes.extend([(3, 2047), (17, 2048), (9, 2049), (12, 4100), (2, 14336)]);
    sizes.extend([(1000, 130), (4096, 272), (0, 64)]);
    for (n, k) in sizes {
        for (stride, shift) in [(k, 0), (k.next_multiple_of(16), 0), (k + 3, 0), (k + 16, 5)] {
            seed += 1;
            check(&device, Panels { n, k }, stride, shift, seed);
        }
    }
}
