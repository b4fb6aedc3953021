//! Results that are written without being zeroed first: by one thread, in memory that is often new, zeros cost as much as
//! the result.

use std::mem::MaybeUninit;

/// Makes `out` a vector of the `n` elements that `write` writes. What it held is gone.
///
/// # Safety
/// `write` writes all of them.
pub(super) unsafe fn fill<T>(
    out: &mut Vec<T>,
    n: usize,
    write: impl FnOnce(&mut [MaybeUninit<T>]),
) {
    out.clear();
    out.reserve_exact(n);
    write(&mut out.spare_capacity_mut()[..n]);
    // SAFETY: so much was reserved and written.
    unsafe { out.set_len(n) };
}
