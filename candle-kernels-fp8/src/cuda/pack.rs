//! Weights in panels: an order of their codes in which products read them from one end to the other.

use cudarc::driver::CudaStream;

use super::error::Error;
use super::launch::{Launch, args};
use super::library::Module;
use super::rows::size;
use super::{Address, Gpu};

/// Rows of a panel.
const ROWS: usize = 8;
/// Codes of a row that an atom holds.
const CODES: usize = 128;
/// Codes of a row that stay together.
const PIECE: usize = 16;
const ATOM: usize = ROWS * CODES;

/// A weight `[n, k]` in panels: where its codes are.
///
/// Eight rows are a panel. Along K it is cut into atoms of 128 codes, 1024 bytes `[8, 128]` each, which follow each
/// other, and so do panels: `[n / 8, k / 128, 8, 128]`, with zeros where `n` or `k` ends before. In row `r` of an atom,
/// the sixteen codes that should be the `c`-th are the `(c ^ r)`-th, as Hopper's warpgroup instructions read tiles with
/// a 128-byte swizzle. So the tile of a product, some panels by some atoms, is a few long pieces of memory that only
/// have to be copied; from row-major rows, it is a piece of 128 bytes for each row and each 128 codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Panels {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
}

impl Panels {
    /// Bytes of the whole weight.
    pub fn len(self) -> usize {
        self.n.next_multiple_of(ROWS) * self.row_len()
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Bytes that a row takes.
    pub(super) fn row_len(self) -> usize {
        self.k.next_multiple_of(CODES)
    }

    /// The byte that holds the code of a row and a column, each below the multiple of 8 and of 128 that the weight
    /// fills.
    pub fn place(self, row: usize, column: usize) -> usize {
        let (panel, r) = (row / ROWS, row % ROWS);
        let (atom, within) = (column / CODES, column % CODES);
        let piece = (within / PIECE) ^ r;
        panel * ROWS * self.row_len() + atom * ATOM + r * CODES + piece * PIECE + within % PIECE
    }
}

/// Copies a weight from rows, `stride` bytes apart and of any alignment, into [`Panels`] at `to`, a multiple of 16.
///
/// # Errors
/// If the device has no FP8 units or the driver refuses the launch.
///
/// # Panics
/// If the stride is below `k`, `to` is no multiple of 16, or sizes do not fit 31 bits.
///
/// # Safety
/// The addresses are of memory of the stream's device, as large as the sizes say, and valid until the stream has passed
/// the launch; they do not overlap.
pub unsafe fn pack(
    stream: &CudaStream,
    (from, stride): (Address, usize),
    to: Address,
    panels: Panels,
    dependent: bool,
) -> Result<(), Error> {
    let (n, k) = check(to, stride, panels);
    let kernel = Module::Pack.kernel("pack_weight")?;
    let (launch, stride) = (launch(stream, panels, dependent)?, stride as u64);
    // SAFETY: the kernel takes these arguments; the caller vouches for the memory.
    unsafe { launch.run(stream, kernel, args![&from, &stride, &to, &n, &k]) }
}

/// Copies a weight from [`Panels`] at `from`, a multiple of 16, to rows, `stride` bytes apart and of any alignment.
/// What is between rows stays as it is.
///
/// # Errors
/// As [`pack`].
///
/// # Panics
/// As [`pack`].
///
/// # Safety
/// As [`pack`].
pub unsafe fn unpack(
    stream: &CudaStream,
    from: Address,
    (to, stride): (Address, usize),
    panels: Panels,
    dependent: bool,
) -> Result<(), Error> {
    let (n, k) = check(from, stride, panels);
    let kernel = Module::Pack.kernel("unpack_weight")?;
    let (launch, stride) = (launch(stream, panels, dependent)?, stride as u64);
    // SAFETY: as in `pack`.
    unsafe { launch.run(stream, kernel, args![&from, &to, &stride, &n, &k]) }
}

fn check(packed: Address, stride: usize, panels: Panels) -> (u32, u32) {
    let Panels { n, k } = panels;
    assert!(stride >= k, "rows of {k} fit their stride of {stride}");
    assert_eq!(packed % 16, 0, "panels start at multiples of 16 bytes");
    (size(n), size(k))
}

/// A block moves up to 16 atoms of a panel, as device code says.
fn launch(stream: &CudaStream, panels: Panels, dependent: bool) -> Result<Launch, Error> {
    Gpu::of(stream)?;
    Ok(Launch {
        grid: [
            size(panels.n.div_ceil(ROWS)),
            size(panels.k.div_ceil(16 * CODES)),
            1,
        ],
        threads: 256,
        shared: 0,
        cluster: 1,
        dependent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte is that of one row and column.
    #[test]
    fn places_fill_the_panels() {
        for (n, k) in [(1, 1), (8, 128), (9, 128), (8, 129), (23, 400)] {
            let panels = Panels { n, k };
            let (rows, columns) = (n.next_multiple_of(8), k.next_multiple_of(128));
            let mut seen = vec![false; panels.len()];
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |k| (row, k))) {
                let seen = &mut seen[panels.place(row, column)];
                assert!(
                    !std::mem::replace(seen, true),
                    "{row}, {column} of {n}, {k}"
                );
            }
            assert!(seen.into_iter().all(|seen| seen), "{n}, {k}");
        }
    }

    /// Of a panel and an atom that are not the first, written out.
    #[test]
    fn places_are_swizzled() {
        let panels = Panels { n: 24, k: 300 };
        let start = 2 * 8 * 384 + 1024;
        assert_eq!(panels.place(16, 128), start);
        assert_eq!(panels.place(16, 128 + 37), start + 37);
        assert_eq!(panels.place(17, 128), start + 128 + 16);
        assert_eq!(panels.place(17, 128 + 16), start + 128);
        assert_eq!(
            panels.place(21, 128 + 2 * 16 + 3),
            start + 5 * 128 + 7 * 16 + 3
        );
        assert_eq!(panels.place(23, 255), start + 7 * 128 + 15);
    }
}
