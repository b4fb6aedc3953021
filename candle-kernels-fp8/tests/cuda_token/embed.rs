//! Embedding: rows are copied bit by bit where types are equal, and rounded to nearest where they are not.

use candle_kernels_fp8::cuda::{self, Embed, Float};

use crate::lengths;
use crate::oracle::cases::Random;
use crate::rows::{FLOATS, POISON, Rows, Values, assert_same, round};
use crate::support_cuda::Device;

struct Case {
    vocab: usize,
    dim: usize,
    ids: Vec<u32>,
    float: Float,
    out_float: Float,
    /// Elements past a multiple of 16 bytes at which the table starts.
    shift: usize,
    dependent: bool,
}

impl Case {
    /// With the first and the last id among others.
    fn new((vocab, dim, n): (usize, usize, usize), float: Float, out_float: Float) -> Self {
        let mut random = Random((vocab * 31 + dim) as u64);
        let mut ids: Vec<u32> = (0..n).map(|_| random.bits() % vocab as u32).collect();
        ids[0] = vocab as u32 - 1;
        ids[n / 2] = 0;
        Self {
            vocab,
            dim,
            ids,
            float,
            out_float,
            shift: 0,
            dependent: false,
        }
    }

    fn table(&self) -> Vec<f32> {
        let mut random = Random((self.dim * 7 + self.vocab) as u64);
        (0..self.vocab * self.dim)
            .map(|_| round(random.signed().powi(3) * 100.0, self.float))
            .collect()
    }

    fn check(&self, device: &Device) {
        let &Self { dim, .. } = self;
        let what = format!(
            "{:?} [{}, {dim}] as {:?}, {} ids, shift {}",
            self.float,
            self.vocab,
            self.out_float,
            self.ids.len(),
            self.shift
        );
        let mut table = self.table();
        // What is a NaN or an infinity stays one.
        table[dim - 1] = f32::NAN;
        table[(self.vocab - 1) * dim] = f32::NEG_INFINITY;
        let rows = Rows::shifted(device, &table, (dim, dim), self.float, self.shift);
        let bytes: Vec<u8> = self.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let ids = device.upload(&bytes);
        let out = Values::new(device, self.ids.len(), dim, dim, self.out_float);
        let unknown = device.upload(&[0; 4]);
        let args = Embed {
            n: self.ids.len(),
            vocab: self.vocab,
            dim,
            table: rows.address(),
            float: self.float,
            ids: ids.address,
            out: out.address(),
            out_float: self.out_float,
            unknown: Some(unknown.address),
            dependent: self.dependent,
        };
        // SAFETY: the memory is as large as the sizes say.
        unsafe { cuda::embed(&device.stream, &args) }.unwrap();
        let mut expected = Vec::new();
        for &id in &self.ids {
            match table.chunks(dim).nth(id as usize) {
                Some(row) => expected.extend(row.iter().map(|&x| round(x, self.out_float))),
                None => expected.extend(vec![f32::NAN; dim]),
            }
        }
        assert_same(&out.get(device), &expected, &what);
        rows.assert_untouched(device);
        let any = self.ids.iter().any(|&id| id as usize >= self.vocab);
        let found = device.download(&unknown).unwrap();
        assert_eq!(found, u32::from(any).to_le_bytes(), "{what}: unknown");
        // Without a place for it, nothing else changes.
        let without = Values::new(device, self.ids.len(), dim, dim, self.out_float);
        let args = Embed {
            out: without.address(),
            unknown: None,
            ..args
        };
        // SAFETY: as above.
        unsafe { cuda::embed(&device.stream, &args) }.unwrap();
        assert_same(&without.get(device), &expected, &what);
    }
}

/// Few and small, for the sanitizers.
#[test]
fn each_kernel() {
    let Some(device) = Device::get() else { return };
    for float in FLOATS {
        for dim in [64, 70] {
            let mut case = Case::new((10, dim, 3), float, Float::Bf16);
            case.ids[1] = 10;
            case.dependent = true;
            case.check(&device);
        }
    }
}

#[test]
fn all_lengths_and_types() {
    let Some(device) = Device::get() else { return };
    for dim in lengths() {
        let float = FLOATS[dim % 3];
        for out_float in FLOATS {
            let mut case = Case::new((23, dim, 1 + dim % 5), float, out_float);
            case.dependent = dim % 2 == 0;
            case.check(&device);
        }
    }
    for float in FLOATS {
        for out_float in FLOATS {
            for dim in [2048, 2056, 2050] {
                Case::new((100, dim, 300), float, out_float).check(&device);
            }
        }
    }
}

#[test]
fn tables_of_any_alignment() {
    let Some(device) = Device::get() else { return };
    for float in FLOATS {
        for shift in [1, 2, 4, 7] {
            for dim in [64, 4096, 77] {
                let mut case = Case::new((11, dim, 5), float, Float::F16);
                case.shift = shift;
                case.check(&device);
            }
        }
    }
}

/// Beyond the table there is nothing to read: neither just behind it nor far away, where 32 bits would overflow.
#[test]
fn unknown_ids_read_nothing() {
    let Some(device) = Device::get() else { return };
    for (dim, float) in [(4096, Float::Bf16), (70, Float::F32), (8, Float::F16)] {
        for id in [23, 24, 1 << 20, i32::MAX as u32, u32::MAX] {
            for at in [0, 3, 6] {
                let mut case = Case::new((23, dim, 7), float, Float::Bf16);
                case.ids[at] = id;
                case.check(&device);
            }
        }
    }
}

/// Offsets in the table past 32 bits.
#[test]
fn tables_of_several_gigabytes() {
    let Some(device) = Device::get() else { return };
    let (vocab, dim) = (1_050_000, 2048);
    // SAFETY: only rows that are written below are read.
    let mut table = unsafe { device.stream.alloc::<u16>(vocab * dim) }.unwrap();
    let ids = [vocab as u32 - 1, 0, 1 << 19];
    for (&id, bits) in ids.iter().zip([0x3f80u16, 0x4000, 0x4040]) {
        let row = vec![bits; dim];
        let mut part = table.slice_mut(id as usize * dim..(id as usize + 1) * dim);
        device.stream.memcpy_htod(&row, &mut part).unwrap();
    }
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let device_ids = device.upload(&bytes);
    let out = Values::new(&device, ids.len(), dim, dim, Float::Bf16);
    let (address, _guard) = cudarc::driver::DevicePtr::device_ptr(&table, &device.stream);
    let args = Embed {
        n: ids.len(),
        vocab,
        dim,
        table: address,
        float: Float::Bf16,
        ids: device_ids.address,
        out: out.address(),
        out_float: Float::Bf16,
        unknown: None,
        dependent: false,
    };
    // SAFETY: the memory is as large as the sizes say.
    unsafe { cuda::embed(&device.stream, &args) }.unwrap();
    let expected = [1.0, 2.0, 3.0].map(|value| vec![value; dim]).concat();
    assert_same(&out.get(&device), &expected, "a large table");
}

#[test]
fn no_ids() {
    let Some(device) = Device::get() else { return };
    let memory = device.upload(&[POISON; 64]);
    let args = Embed {
        n: 0,
        vocab: 1,
        dim: 8,
        table: memory.address,
        float: Float::Bf16,
        ids: memory.address,
        out: memory.address,
        out_float: Float::Bf16,
        unknown: None,
        dependent: false,
    };
    // SAFETY: nothing is read or written.
    unsafe { cuda::embed(&device.stream, &args) }.unwrap();
    assert_eq!(device.download(&memory).unwrap(), [POISON; 64]);
}
