//! What a kernel is launched with.

use super::Library;

/// Threads of a SIMD group, on every GPU that the kernels are for.
pub const LANES: usize = 32;

/// Memory of a buffer, from a byte on.
#[derive(Debug)]
pub struct Slice<'a, B> {
    /// The buffer.
    pub buffer: &'a B,
    /// Where the first element starts, in bytes; a multiple of the element's size.
    pub offset: usize,
}

/// What holds memory of any type can be copied: it borrows.
macro_rules! copies {
    ($($name:ident)*) => {$(
        impl<B> Clone for $name<'_, B> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<B> Copy for $name<'_, B> {}
    )*};
}
pub(super) use copies;
copies!(Slice Binding);

impl<B> Slice<'_, B> {
    /// So many bytes further on.
    pub fn after(self, bytes: usize) -> Self {
        Self {
            offset: self.offset + bytes,
            ..self
        }
    }
}

/// What a kernel does with a buffer.
#[derive(Debug)]
pub enum Binding<'a, B> {
    /// It reads alone.
    Read(Slice<'a, B>),
    /// It writes, and may read.
    Write(Slice<'a, B>),
}

/// A kernel, its arguments and its grid.
#[derive(Debug)]
pub struct Launch<'a, B> {
    /// Where the kernel is.
    pub library: Library,
    /// Its name.
    pub kernel: &'static str,
    /// The bytes of its buffer 0, as 32-bit numbers.
    pub words: &'a [u32],
    /// Its buffers 1 and on.
    pub buffers: &'a [Binding<'a, B>],
    /// Groups of threads; not 0.
    pub groups: usize,
    /// Threads of a group: a multiple of [`LANES`], at most 1024.
    pub threads: usize,
}

/// What runs kernels, one after the other as far as their buffers ask for it.
pub trait Queue {
    /// Memory.
    type Buffer;
    /// Why a kernel could not be launched.
    type Error;

    /// Launches a kernel.
    ///
    /// # Errors
    /// If the device refuses it.
    fn launch(&self, launch: &Launch<'_, Self::Buffer>) -> Result<(), Self::Error>;
}

/// A size as device code has it.
///
/// # Panics
/// If it does not fit.
pub(super) fn word(size: usize) -> u32 {
    u32::try_from(size).expect("sizes fit 32 bits")
}

/// Threads for so many elements, of which each thread should have a few; no more than `most`.
pub(super) fn threads_for(elements: usize, most: usize) -> usize {
    elements
        .div_ceil(4)
        .next_multiple_of(LANES)
        .clamp(LANES, most)
}
