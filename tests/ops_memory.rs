//! An FP8 linear stays one byte for each parameter: nothing keeps, or for a moment makes, an expanded weight.

use candle_core::{DType, Device, Result, Tensor};
use candle_fp8::{Input, Quantization, ScaleLayout, scaled_mm};
use float8::F8E4M3;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Counts the bytes that are allocated now, and the most there were.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: allocation is the system's; counting touches only two atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(live, SeqCst);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promises are passed on, and `alloc` took the memory from the same place.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test, so that nothing else allocates meanwhile.
#[test]
fn weights_stay_one_byte() -> Result<()> {
    let device = &Device::Cpu;
    let (n, k) = (1536, 2048);
    let parameters = n * k;

    // Rayon's threads and their queues are there before anything is counted.
    let warm = Tensor::zeros((1536, 2048), DType::F8E4M3, device)?;
    let one = Tensor::ones(1, DType::F32, device)?;
    for m in [1, 3] {
        let x = Tensor::ones((m, k), DType::BF16, device)?;
        scaled_mm(Input::Full(&x), &warm, &one, ScaleLayout::Tensor, None)?;
    }
    drop(warm);

    let before = LIVE.load(SeqCst);
    let weight = Tensor::from_vec(vec![F8E4M3::ONE; parameters], (n, k), device)?;
    let held = LIVE.load(SeqCst) - before;
    assert!(
        (parameters..parameters + 4096).contains(&held),
        "{held} bytes hold {parameters} parameters"
    );

    let block = ScaleLayout::Block {
        rows: 128,
        cols: 128,
    };
    for layout in [ScaleLayout::Tensor, ScaleLayout::Channel, block] {
        let scale = Tensor::ones(layout.shape(n, k), DType::F32, device)?;
        for m in [1, 2, 16] {
            let x = Tensor::ones((m, k), DType::BF16, device)?;
            for input in [
                Input::Full(&x),
                Input::Quantize(&x, Quantization::PerToken),
                Input::Quantize(&x, Quantization::PerGroup(128)),
            ] {
                let live = LIVE.load(SeqCst);
                PEAK.store(live, SeqCst);
                let y = scaled_mm(input, &weight, &scale, layout, None)?;
                let peak = PEAK.load(SeqCst) - live;
                // Activations [m, k] as f32 and as codes, results [m, n] three times, and in each task a tile of
                // 4 x 1024 floats and its sums.
                let tasks = 2 * std::thread::available_parallelism().map_or(1, usize::from);
                let allowed = m * k * 5 + m * n * 12 + tasks * (4 * 1024 * 4 + m * 16) + 65536;
                assert!(peak <= allowed, "m {m}: {peak} bytes, at most {allowed}");
                assert!(
                    peak < parameters / 4,
                    "m {m}: {peak} bytes beside {parameters}"
                );
                drop(y);
                let left = LIVE.load(SeqCst).saturating_sub(live);
                assert!(left < 4096, "{left} bytes stay after a forward");
            }
        }
    }
    let held = LIVE.load(SeqCst) - before;
    assert!(
        (parameters..parameters + 65536).contains(&held),
        "{held} bytes after all forwards"
    );
    Ok(())
}
