//! Gigabytes of random bits, on all cores.

/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 22;

/// Calls `write` with a random word for every `group` elements of `values` (fewer at the end).
///
/// The words depend on `seed` and the position alone, not on the number of threads.
pub(crate) fn words<T: Send>(
    values: &mut [T],
    group: usize,
    seed: u64,
    write: impl Fn(u64, &mut [T]) + Sync,
) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let chunk = CHUNK / group * group;
    let chunks = std::sync::Mutex::new(values.chunks_mut(chunk).enumerate());
    let work = || {
        loop {
            // Nothing can panic while the lock is held, and `write` runs without it.
            let next = chunks.lock().ok().and_then(|mut chunks| chunks.next());
            let Some((index, chunk_values)) = next else {
                break;
            };
            let first = (index * (chunk / group)) as u64;
            for (position, group) in (first..).zip(chunk_values.chunks_mut(group)) {
                write(word(seed, position), group);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
}

/// A seed that depends on a name (FNV-1a).
pub(crate) fn seed(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Word `position` of a stream (SplitMix64).
pub(crate) fn word(seed: u64, position: u64) -> u64 {
    let mut z = seed.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_written_from_its_own_word() {
        let mut values = vec![0u64; CHUNK + 3];
        words(&mut values, 1, 7, |word, value| value[0] = word);
        for position in [0, 1, CHUNK - 1, CHUNK, CHUNK + 2] {
            assert_eq!(values[position], word(7, position as u64), "{position}");
        }
        let mut values = vec![0u64; 11];
        words(&mut values, 4, 7, |word, values| values.fill(word));
        assert_eq!(values[3], word(7, 0));
        assert_eq!(values[4], word(7, 1));
        assert_eq!(values[10], word(7, 2));
    }
}
