//! Where tensors lie in a device's memory, and copies of those that lie otherwise than kernels ask for.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, MetalStorage, Result};
use candle_kernels_fp8::metal::{self as kernels, Slice};
use candle_metal_kernels::metal::Buffer;
use std::sync::Arc;

use super::{On, View};
use crate::strides::row_stride;

/// All of a storage's memory.
pub(crate) fn slice(storage: &MetalStorage) -> Slice<'_, Buffer> {
    Slice {
        buffer: storage.buffer(),
        offset: 0,
    }
}

enum Memory<'a> {
    Tensor(&'a MetalStorage),
    Copy(MetalStorage),
}

/// The rows of a tensor `[.., K]`, each of them dense and all of them evenly spaced: where they lie, or in a copy.
pub(crate) struct Rows<'a> {
    memory: Memory<'a>,
    /// Elements before the first row.
    start: usize,
    pub(crate) m: usize,
    pub(crate) k: usize,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
}

impl<'a> Rows<'a> {
    /// A tensor without dimensions has one row of one element.
    pub(crate) fn of(on: &On<'_>, (storage, layout): (&'a MetalStorage, &Layout)) -> Result<Self> {
        let k = layout.dims().last().copied().unwrap_or(1);
        let m = layout.shape().elem_count() / k.max(1);
        let (memory, start, stride) = match row_stride(layout) {
            Some(stride) => (Memory::Tensor(storage), layout.start_offset(), stride),
            None => (Memory::Copy(contiguous(on, (storage, layout))?), 0, k),
        };
        Ok(Self {
            memory,
            start,
            m,
            k,
            stride,
        })
    }

    /// All elements as one row.
    pub(crate) fn flat(
        on: &On<'_>,
        (storage, layout): (&'a MetalStorage, &Layout),
    ) -> Result<Self> {
        let k = layout.shape().elem_count();
        let (memory, start) = match layout.contiguous_offsets() {
            Some((start, _)) => (Memory::Tensor(storage), start),
            None => (Memory::Copy(contiguous(on, (storage, layout))?), 0),
        };
        Ok(Self {
            memory,
            start,
            m: 1,
            k,
            stride: k,
        })
    }

    /// A copy of rows of codes that start at multiples of 16 bytes, with zeros between them.
    pub(crate) fn padded(&self, on: &On<'_>) -> Result<MetalStorage> {
        let copy = on.alloc(self.m * kernels::padded(self.k), DType::F8E4M3)?;
        kernels::pad_rows(
            on,
            (self.slice(), self.stride),
            slice(&copy),
            (self.m, self.k),
        )?;
        Ok(copy)
    }

    pub(crate) fn dtype(&self) -> DType {
        self.storage().dtype()
    }

    /// From the first row on.
    pub(crate) fn slice(&self) -> Slice<'_, Buffer> {
        slice(self.storage()).after(self.start * self.dtype().size_in_bytes())
    }

    fn storage(&self) -> &MetalStorage {
        match &self.memory {
            Memory::Tensor(storage) => storage,
            Memory::Copy(storage) => storage,
        }
    }
}

/// A copy of a tensor, in row-major order.
fn contiguous(on: &On<'_>, (storage, layout): View<'_>) -> Result<MetalStorage> {
    let count = layout.shape().elem_count();
    // Candle has no copies of codes in another order, but of bytes.
    let dtype = match storage.dtype() {
        DType::F8E4M3 => DType::U8,
        other => other,
    };
    let end = layout.start_offset() + count;
    // Seen as bytes during the copy alone, in which `storage` keeps the memory.
    let from = on.storage(Arc::new(storage.buffer().clone()), end, dtype);
    let buffer = on.buffer(count, dtype)?;
    if count > 0 {
        let mut to = on.storage(buffer.clone(), count, dtype);
        from.copy_strided_src(&mut to, 0, layout)?;
    }
    Ok(on.storage(buffer, count, storage.dtype()))
}
