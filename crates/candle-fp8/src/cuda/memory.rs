//! Where tensors lie in a device's memory, and copies of those that lie otherwise than kernels ask for.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda_backend::{
    CudaStorageSlice, SlicePtrOrNull, WrapErr, kernels as candle_kernels,
};
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};
use candle_kernels_fp8::cuda::{self as kernels, Address};
use std::cell::Cell;

use super::{On, View};
use crate::strides::{merged_heads, row_stride};

/// An address in use by a kernel. It is kept until after the launch; then other streams know what to wait for.
pub(crate) struct InUse<'a> {
    pub(crate) address: Address,
    _until_launched: SyncOnDrop<'a>,
}

/// Calls a function on the slice of a storage, whatever its type.
macro_rules! on_slice {
    ($storage:expr, $slice:expr, $name:ident => $call:expr) => {
        match $slice {
            CudaStorageSlice::U8($name) => $call,
            CudaStorageSlice::U32($name) => $call,
            CudaStorageSlice::BF16($name) => $call,
            CudaStorageSlice::F16($name) => $call,
            CudaStorageSlice::F32($name) => $call,
            CudaStorageSlice::F8E4M3($name) => $call,
            _ => bail!("no kernel takes a {:?} tensor", $storage),
        }
    };
}

/// The address of an element that a kernel reads, and others after it.
fn reads<'a>(storage: &'a CudaStorage, offset: usize, stream: &'a CudaStream) -> Result<InUse<'a>> {
    fn of<'a, T>(slice: &'a CudaSlice<T>, offset: usize, stream: &'a CudaStream) -> InUse<'a> {
        let (start, guard) = slice.device_ptr(stream);
        InUse {
            address: start + (offset * size_of::<T>()) as Address,
            _until_launched: guard,
        }
    }
    let dtype = storage.dtype();
    Ok(on_slice!(dtype, &storage.slice, slice => of(slice, offset, stream)))
}

/// The address of memory that a kernel writes.
pub(crate) fn writes<'a>(
    storage: &'a mut CudaStorage,
    stream: &'a CudaStream,
) -> Result<InUse<'a>> {
    fn of<'a, T>(slice: &'a mut CudaSlice<T>, stream: &'a CudaStream) -> InUse<'a> {
        let (address, guard) = slice.device_ptr_mut(stream);
        InUse {
            address,
            _until_launched: guard,
        }
    }
    let dtype = storage.dtype();
    Ok(on_slice!(dtype, &mut storage.slice, slice => of(slice, stream)))
}

/// The address of an element of a tensor that a kernel reads, and others after it.
pub(crate) fn first<'a>((storage, layout): View<'a>, stream: &'a CudaStream) -> Result<InUse<'a>> {
    reads(storage, layout.start_offset(), stream)
}

/// Calls `f` with the memory of a tensor on a GPU, and the address of its first element, for kernels that write into it
/// where it lies: a cache, or scratch memory.
///
/// The tensor is locked meanwhile: `f` must not look at another view of the same memory.
pub(crate) fn in_place<T>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(&On<'_>, Address) -> Result<T>,
) -> Result<T> {
    struct InPlace<F, T> {
        op: &'static str,
        f: Cell<Option<F>>,
        made: Cell<Option<T>>,
    }
    impl<T, F: FnOnce(&On<'_>, Address) -> Result<T>> InplaceOp1 for InPlace<F, T> {
        fn name(&self) -> &'static str {
            self.op
        }

        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
            bail!("a tensor of another device in a kernel for CUDA")
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
            let device = storage.device.clone();
            let on = On::new(self.op, &device);
            let offset = layout.start_offset() * storage.dtype().size_in_bytes();
            let memory = writes(storage, on.stream())?;
            if let Some(f) = self.f.take() {
                self.made
                    .set(Some(f(&on, memory.address + offset as Address)?));
            }
            Ok(())
        }
    }
    let op = InPlace {
        op,
        f: Cell::new(Some(f)),
        made: Cell::new(None),
    };
    tensor.inplace_op1(&op)?;
    match op.made.take() {
        Some(made) => Ok(made),
        None => bail!("{}: an op in place was not called", op.op),
    }
}

enum Memory<'a> {
    Tensor(&'a CudaStorage),
    Copy(CudaStorage),
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
    pub(crate) fn of(on: &On<'_>, (storage, layout): (&'a CudaStorage, &Layout)) -> Result<Self> {
        let k = layout.dims().last().copied().unwrap_or(1);
        let m = layout.shape().elem_count() / k.max(1);
        Ok(match row_stride(layout) {
            Some(stride) => Self {
                memory: Memory::Tensor(storage),
                start: layout.start_offset(),
                m,
                k,
                stride,
            },
            None => Self {
                memory: Memory::Copy(contiguous(on, (storage, layout))?),
                start: 0,
                m,
                k,
                stride: k,
            },
        })
    }

    /// The tokens of a tensor `[.., H, D]`, each of them a row of `H · D`.
    pub(crate) fn of_heads(
        on: &On<'_>,
        (storage, layout): (&'a CudaStorage, &Layout),
    ) -> Result<Self> {
        if let Some(layout) = merged_heads(layout) {
            return Self::of(on, (storage, &layout));
        }
        let k = layout.dims().iter().rev().take(2).product::<usize>();
        Ok(Self {
            memory: Memory::Copy(contiguous(on, (storage, layout))?),
            start: 0,
            m: layout.shape().elem_count() / k.max(1),
            k,
            stride: k,
        })
    }

    /// All elements as one row.
    pub(crate) fn flat(on: &On<'_>, (storage, layout): (&'a CudaStorage, &Layout)) -> Result<Self> {
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

    /// With rows that start at multiples of 16 bytes, as products ask for; copied if they do not.
    pub(crate) fn aligned(self, on: &On<'_>) -> Result<Self> {
        let address = self.reads(on.stream())?.address as usize;
        if (address | self.row_bytes(self.stride)).is_multiple_of(16) {
            return Ok(self);
        }
        self.into_padded(on)
    }

    /// As [`Rows::aligned`], with nothing but zeros between rows.
    pub(crate) fn zero_padded(self, on: &On<'_>) -> Result<Self> {
        match self.row_bytes(self.k).is_multiple_of(16) {
            true => self.aligned(on),
            false => self.into_padded(on),
        }
    }

    fn into_padded(self, on: &On<'_>) -> Result<Self> {
        Ok(Self {
            memory: Memory::Copy(self.padded(on)?),
            start: 0,
            stride: self.padded_stride(),
            ..self
        })
    }

    /// A copy with rows that start at multiples of 16 bytes, and zeros between them.
    pub(crate) fn padded(&self, on: &On<'_>) -> Result<CudaStorage> {
        let dtype = self.dtype();
        let mut copy = on.alloc(self.m * self.padded_stride(), dtype)?;
        {
            let from = self.reads(on.stream())?;
            let to = writes(&mut copy, on.stream())?;
            let from = (from.address, self.row_bytes(self.stride));
            let sizes = (self.m, self.row_bytes(self.k));
            // SAFETY: the tensor has `m` rows that are so far apart, and the copy has room for them; both live until they
            // are freed in the stream's order.
            on.launched(unsafe { kernels::pad_rows(on.stream(), from, to.address, sizes, false) })?;
        }
        Ok(copy)
    }

    /// Elements from one row to the next in a padded copy.
    fn padded_stride(&self) -> usize {
        kernels::padded(self.row_bytes(self.k)) / self.row_bytes(1)
    }

    pub(crate) fn dtype(&self) -> DType {
        self.storage().dtype()
    }

    /// The address of the first row.
    pub(crate) fn reads<'b>(&'b self, stream: &'b CudaStream) -> Result<InUse<'b>> {
        reads(self.storage(), self.start, stream)
    }

    fn storage(&self) -> &CudaStorage {
        match &self.memory {
            Memory::Tensor(storage) => storage,
            Memory::Copy(storage) => storage,
        }
    }

    fn row_bytes(&self, elements: usize) -> usize {
        elements * self.dtype().size_in_bytes()
    }
}

/// A copy of a tensor, in row-major order.
fn contiguous(on: &On<'_>, (storage, layout): View<'_>) -> Result<CudaStorage> {
    let count = layout.shape().elem_count();
    let mut copy = on.alloc(count, storage.dtype())?;
    let (CudaStorageSlice::F8E4M3(from), CudaStorageSlice::F8E4M3(to)) =
        (&storage.slice, &mut copy.slice)
    else {
        storage.copy_strided_src(&mut copy, 0, layout)?;
        return Ok(copy);
    };
    if count > 0 {
        // For codes, Candle 0.11 asks for a kernel by a name that none has. That for bytes does the same.
        let function = on
            .device()
            .get_or_load_func("ucopy_u8", &candle_kernels::UNARY)?;
        let params = SlicePtrOrNull::params_from_layout(on.device(), layout)?;
        let (from, rank) = (from.slice(layout.start_offset()..), layout.dims().len());
        let mut launch = function.builder();
        launch.arg(&count).arg(&rank);
        params.builder_arg(&mut launch);
        launch.arg(&from).arg(to);
        let config = LaunchConfig::for_num_elems(count as u32);
        // SAFETY: the kernel takes a count, a rank, dimensions and strides, and both slices; codes are bytes.
        unsafe { launch.launch(config) }.w()?;
    }
    Ok(copy)
}
