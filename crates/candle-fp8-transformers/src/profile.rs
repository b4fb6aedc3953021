//! Where the time of a forward pass goes.

#[cfg(feature = "cuda")]
mod events;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;

/// What a forward pass consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Part {
    /// Rows of the embedding.
    Embedding,
    /// Sines, cosines and masks of the new positions.
    Positions,
    /// RMS norms, with the additions to the residual stream before them.
    Norms,
    /// Query, key and value projections.
    QkvProj,
    /// Rotation of queries and keys.
    Rope,
    /// Writing keys and values into the cache.
    KvCache,
    /// Scores, softmax and the sum of the values.
    Attention,
    /// Output projection of attention.
    OProj,
    /// Gate and up projections; all of the MLP where one call computes it, on an XPU.
    GateUpProj,
    /// `silu(gate) · up`.
    SiluMul,
    /// Down projection.
    DownProj,
    /// Router and experts of a sparse layer.
    Experts,
    /// The output projection, which gives the logits.
    LmHead,
}

impl Part {
    /// All of them, in the order of a forward pass.
    pub const ALL: [Self; 13] = [
        Self::Embedding,
        Self::Positions,
        Self::Norms,
        Self::QkvProj,
        Self::Rope,
        Self::KvCache,
        Self::Attention,
        Self::OProj,
        Self::GateUpProj,
        Self::SiluMul,
        Self::DownProj,
        Self::Experts,
        Self::LmHead,
    ];

    /// A short name, in checkpoints' words where they have one: `qkv_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embed_tokens",
            Self::Positions => "positions",
            Self::Norms => "norms",
            Self::QkvProj => "qkv_proj",
            Self::Rope => "rope",
            Self::KvCache => "kv_cache",
            Self::Attention => "attention",
            Self::OProj => "o_proj",
            Self::GateUpProj => "gate_up_proj",
            Self::SiluMul => "silu_mul",
            Self::DownProj => "down_proj",
            Self::Experts => "experts",
            Self::LmHead => "lm_head",
        }
    }
}

/// Adds up how long each [`Part`] took, over the forward passes it is given to:
/// [`CausalLm::forward_profiled`](crate::CausalLm::forward_profiled).
///
/// On CUDA the device notes when it begins and ends a part, and is waited for after a forward pass: parts take what they
/// take otherwise, as long as the device, and not the host, is what is waited for. On other devices that compute
/// asynchronously every part is waited for, which makes the whole slower than it is.
#[derive(Debug)]
pub struct Profile {
    device: Device,
    /// Parts of a forward pass under way.
    #[cfg(feature = "cuda")]
    events: events::Events,
    /// In nanoseconds.
    times: [AtomicU64; Part::ALL.len()],
}

impl Profile {
    /// Nothing measured yet, for a model on `device`.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            #[cfg(feature = "cuda")]
            events: Default::default(),
            times: Default::default(),
        }
    }

    /// How long a part took, in all forward passes together.
    pub fn time(&self, part: Part) -> Duration {
        Duration::from_nanos(self.times[part as usize].load(Ordering::Relaxed))
    }

    /// How long all parts took.
    pub fn total(&self) -> Duration {
        Part::ALL.iter().map(|&part| self.time(part)).sum()
    }

    fn add(&self, part: Part, nanoseconds: u64) {
        self.times[part as usize].fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// Hands the parts of a forward pass to a [`Profile`], if there is one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timer<'p>(Option<&'p Profile>);

impl<'p> Timer<'p> {
    /// Measures nothing.
    pub(crate) const OFF: Self = Self(None);

    pub(crate) fn new(profile: &'p Profile) -> Self {
        Self(Some(profile))
    }

    /// Whether it measures.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_on(self) -> bool {
        self.0.is_some()
    }

    /// Does `work`, and adds the time it took to `part`. Parts do not nest.
    #[inline]
    pub(crate) fn time<T, E: From<candle_core::Error>>(
        self,
        part: Part,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let Some(profile) = self.0 else {
            return work();
        };
        #[cfg(feature = "cuda")]
        if let Device::Cuda(cuda) = &profile.device {
            return profile.events.around(cuda, part, work);
        }
        let start = Instant::now();
        let result = work()?;
        profile.device.synchronize()?;
        profile.add(part, start.elapsed().as_nanos() as u64);
        Ok(result)
    }

    /// Waits for the parts of a forward pass that has been started, and adds their times.
    pub(crate) fn end(self) -> candle_core::Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(profile) = self.0 {
            profile
                .events
                .settle(|part, time| profile.add(part, time))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nap(part: Part, timer: Timer<'_>) -> candle_core::Result<u8> {
        timer.time(part, || {
            std::thread::sleep(Duration::from_millis(2));
            Ok(7)
        })
    }

    #[test]
    fn times_add_up_under_their_own_part() {
        let profile = Profile::new(&Device::Cpu);
        let timer = Timer::new(&profile);
        assert_eq!(nap(Part::Norms, timer).unwrap(), 7);
        assert_eq!(nap(Part::Norms, timer).unwrap(), 7);
        nap(Part::LmHead, timer).unwrap();
        nap(Part::Rope, Timer::OFF).unwrap();
        assert!(profile.time(Part::Norms) >= Duration::from_millis(4));
        assert!(profile.time(Part::LmHead) >= Duration::from_millis(2));
        assert_eq!(profile.time(Part::Rope), Duration::ZERO);
        let sum: Duration = Part::ALL.iter().map(|&part| profile.time(part)).sum();
        assert_eq!(sum, profile.total());
    }

    #[test]
    fn every_part_has_its_place_and_name() {
        for (index, part) in Part::ALL.into_iter().enumerate() {
            assert_eq!(part as usize, index);
            let same = Part::ALL.iter().filter(|other| other.name() == part.name());
            assert_eq!(same.count(), 1);
        }
    }
}
