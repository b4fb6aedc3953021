//! Memory that starts where a cache line does: a vector that crosses from one line to the next costs two accesses.

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the longest vector.
const LINE: usize = 64;

/// Elements, the first of which starts a cache line.
pub(crate) struct Aligned<T> {
    memory: Vec<MaybeUninit<T>>,
    start: usize,
    len: usize,
}

impl<T: Copy> Aligned<T> {
    /// `len` times `value`.
    pub(crate) fn filled(value: T, len: usize) -> Self {
        // SAFETY: all of it is written.
        unsafe { Self::written(len, |memory| memory.fill(MaybeUninit::new(value))) }
    }

    /// `len` elements that `write` writes.
    ///
    /// # Safety
    /// It writes all of them.
    pub(crate) unsafe fn written(len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> Self {
        let mut memory: Vec<MaybeUninit<T>> = Vec::with_capacity(len + LINE / size_of::<T>());
        // SAFETY: elements that need not be initialized.
        unsafe { memory.set_len(memory.capacity()) };
        let start = memory.as_ptr().align_offset(LINE);
        write(&mut memory[start..start + len]);
        Self { memory, start, len }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `written` was promised that these are initialized.
        unsafe { self.memory[self.start..][..self.len].assume_init_ref() }
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`.
        unsafe { self.memory[self.start..][..self.len].assume_init_mut() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_a_line() {
        for len in [0, 1, 7, 1000] {
            let mut aligned = Aligned::filled(3u16, len);
            assert_eq!(aligned.as_ptr().addr() % LINE, 0);
            aligned.iter_mut().for_each(|x| *x += 1);
            assert_eq!(&aligned[..], vec![4; len]);
        }
    }
}
