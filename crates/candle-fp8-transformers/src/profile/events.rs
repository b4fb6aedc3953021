//! When a CUDA device begins and ends a part.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};
use candle_core::{CudaDevice, Result};

use super::Part;

/// Parts that were started, and not yet waited for: between the two events of each, on the device's stream.
#[derive(Debug, Default)]
pub(super) struct Events(Mutex<Vec<(Part, CudaEvent, CudaEvent)>>);

impl Events {
    /// Does `work`, between two events.
    pub(super) fn around<T, E: From<candle_core::Error>>(
        &self,
        device: &CudaDevice,
        part: Part,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let start = event(device)?;
        let result = work()?;
        let end = event(device)?;
        self.parts().push((part, start, end));
        Ok(result)
    }

    /// Waits for all parts, and gives each with its nanoseconds.
    pub(super) fn settle(&self, mut add: impl FnMut(Part, u64)) -> Result<()> {
        let parts = std::mem::take(&mut *self.parts());
        for (part, start, end) in parts {
            let milliseconds = start.elapsed_ms(&end).w()?;
            add(part, (f64::from(milliseconds) * 1e6) as u64);
        }
        Ok(())
    }

    /// Nothing panics while it is locked.
    fn parts(&self) -> MutexGuard<'_, Vec<(Part, CudaEvent, CudaEvent)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes the time when the stream gets there.
fn event(device: &CudaDevice) -> Result<CudaEvent> {
    let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
    device.cuda_stream().record_event(Some(flags)).w()
}
