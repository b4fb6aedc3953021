//! Tensors as Hopper's copy engine sees them.

use cudarc::driver::sys;
use std::ffi::c_void;

use super::Address;
use super::error::{Error, check};

/// A tensor as the copy engine sees it: sizes and strides from the innermost dimension on, which has no stride. What a
/// copy brings is a tile.
pub(super) struct Map<'a> {
    pub(super) elements: sys::CUtensorMapDataType,
    pub(super) address: Address,
    pub(super) sizes: &'a [u64],
    /// In bytes.
    pub(super) strides: &'a [u64],
    pub(super) tile: &'a [u32],
    pub(super) swizzle: sys::CUtensorMapSwizzle,
}

impl Map<'_> {
    pub(super) fn encode(&self) -> Result<sys::CUtensorMap, Error> {
        let rank = self.sizes.len();
        assert!(rank == self.tile.len() && rank == self.strides.len() + 1);
        // SAFETY: zeros are a valid value of this plain C struct.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        // SAFETY: the arrays are as long as the rank asks for, 5 being the highest; the address is not read here.
        check(unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                self.elements,
                rank as u32,
                self.address as *mut c_void,
                self.sizes.as_ptr(),
                self.strides.as_ptr(),
                self.tile.as_ptr(),
                [1u32; 5].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                self.swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })?;
        Ok(map)
    }
}
