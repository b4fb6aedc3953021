//! Sums and maxima in lanes: the order of the additions is the program's, so that every instruction set gives the same
//! bits.

/// Adds lanes up as a tree. `N` is a power of two.
#[inline(always)]
pub(super) fn sum<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut width = N;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// The largest lane, NaN aside. `N` is a power of two.
#[inline(always)]
pub(super) fn max<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut width = N;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = larger(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// The larger of the two; `a` where one is NaN.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}
