//! How kernels are compiled, kept and launched.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr;

use opencl3::kernel::{Kernel, set_kernel_arg, set_kernel_arg_svm_pointer};
use opencl3::program::Program;
use opencl3::types::cl_mem;

use crate::memory::{Allocation, Pointer};
use crate::{Element, Error, XpuDevice};

/// The kernels of products that a device can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernels {
    /// OpenCL C 1.2, without subgroups and without halves.
    Plain,
    /// Those of few rows on subgroups.
    Subgroups,
    /// Those of many rows on matrix units (DPAS), too.
    Matrix,
}

/// A source of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Quantize,
    SiluMul,
    ScaledMmAny,
    ScaledMmTiled,
    ScaledMmFew,
    ScaledMmMatrix,
    /// Divisions alone, on a device whose own are off as far as the standard lets them.
    #[cfg(test)]
    Divide,
}

impl Source {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quantize => "quantize",
            Self::SiluMul => "silu_mul",
            Self::ScaledMmAny => "scaled_mm_any",
            Self::ScaledMmTiled => "scaled_mm_tiled",
            Self::ScaledMmFew => "scaled_mm_few",
            Self::ScaledMmMatrix => "scaled_mm_matrix",
            #[cfg(test)]
            Self::Divide => "divide",
        }
    }

    pub(crate) fn text(self) -> String {
        let product = include_str!("kernels/scaled_mm.h");
        let parts = match self {
            Self::Quantize => ["", include_str!("kernels/quantize.cl")],
            Self::SiluMul => ["", include_str!("kernels/silu_mul.cl")],
            Self::ScaledMmAny => [product, include_str!("kernels/scaled_mm_any.cl")],
            Self::ScaledMmTiled => [product, include_str!("kernels/scaled_mm_tiled.cl")],
            Self::ScaledMmFew => [product, include_str!("kernels/scaled_mm_few.cl")],
            Self::ScaledMmMatrix => [product, include_str!("kernels/scaled_mm_matrix.cl")],
            #[cfg(test)]
            Self::Divide => return tests::divide_text(),
        };
        [&[include_str!("kernels/common.h")], &parts[..]]
            .concat()
            .concat()
    }
}

/// A source with what it is compiled for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) source: Source,
    /// Type of activations.
    pub(crate) x: Element,
    /// Macros with their values.
    pub(crate) defines: Vec<(&'static str, usize)>,
}

impl Variant {
    /// As compilers take them.
    pub(crate) fn options(&self) -> String {
        let defines = self
            .defines
            .iter()
            .map(|(name, value)| format!(" -D{name}={value}"));
        format!("-DX={}{}", self.x as u32, defines.collect::<String>())
    }
}

/// What was compiled on a device.
#[derive(Default)]
pub(crate) struct Programs(HashMap<(Variant, &'static str), Kernel>);

/// An argument of a kernel.
pub(crate) enum Arg<'a> {
    Memory(&'a Allocation),
    /// No memory.
    Nothing,
    /// Bytes of a struct.
    Value(&'a [u8]),
    /// So many bytes of a work-group's own memory.
    Local(usize),
}

/// The bytes of a kernel's struct.
///
/// # Safety
/// The type has no padding.
pub(crate) unsafe fn struct_bytes<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: without padding all bytes are initialized.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl XpuDevice {
    /// Launches a kernel with so many work-groups of so many work-items.
    ///
    /// # Safety
    /// The kernel takes these arguments, and stays in the memory that they have.
    pub(crate) unsafe fn launch(
        &self,
        variant: Variant,
        kernel: &'static str,
        args: &[Arg<'_>],
        groups: [usize; 2],
        items: [usize; 2],
    ) -> Result<(), Error> {
        // Held until the launch: arguments belong to the kernel.
        let mut programs = self.programs();
        let kernel = match programs.0.entry((variant, kernel)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let (variant, name) = entry.key();
                let made = self.build(variant, name)?;
                entry.insert(made)
            }
        };
        for (index, arg) in (0..).zip(args) {
            let nothing: cl_mem = ptr::null_mut();
            let handle =
                |memory: &cl_mem| (size_of::<cl_mem>(), ptr::from_ref(memory).cast::<c_void>());
            // SAFETY: the caller vouches for the arguments.
            let set = unsafe {
                match arg {
                    Arg::Memory(memory) => match memory.pointer() {
                        Pointer::Shared(start) => {
                            set_kernel_arg_svm_pointer(kernel.get(), index, start)
                        }
                        Pointer::Buffer(buffer) => {
                            let (size, value) = handle(&buffer);
                            set_kernel_arg(kernel.get(), index, size, value)
                        }
                    },
                    Arg::Nothing => {
                        let (size, value) = handle(&nothing);
                        set_kernel_arg(kernel.get(), index, size, value)
                    }
                    Arg::Value(bytes) => {
                        set_kernel_arg(kernel.get(), index, bytes.len(), bytes.as_ptr().cast())
                    }
                    Arg::Local(bytes) => set_kernel_arg(kernel.get(), index, *bytes, ptr::null()),
                }
            };
            self.check("clSetKernelArg", set.map_err(Into::into))?;
        }
        let all = [groups[0] * items[0], groups[1] * items[1]];
        // SAFETY: two sizes each; the caller vouches for the rest.
        let launched = unsafe {
            self.inner.queue.enqueue_nd_range_kernel(
                kernel.get(),
                2,
                ptr::null(),
                all.as_ptr(),
                items.as_ptr(),
                &[],
            )
        };
        self.check("clEnqueueNDRangeKernel", launched).map(drop)
    }

    fn build(&self, variant: &Variant, name: &str) -> Result<Kernel, Error> {
        let options = variant.options();
        let created = Program::create_from_source(&self.inner.context, &variant.source.text());
        let mut program = self.check("clCreateProgramWithSource", created)?;
        if let Err(error) = program.build(self.inner.context.devices(), &options) {
            let log = program
                .get_build_log(self.inner.device.id())
                .unwrap_or_default();
            return Err(Error::Build {
                device: self.info().name.clone(),
                program: format!("{} ({options})", variant.source.name()),
                log: format!("{}\nOpenCL error {}", log.trim(), error.0),
            });
        }
        self.check("clCreateKernel", Kernel::create(&program, name))
    }
}

#[cfg(test)]
mod tests;
