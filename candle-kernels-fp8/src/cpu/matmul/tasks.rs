//! Work shared among rayon's threads.

use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs `f` on one of the threads of rayon's pool.
///
/// A kernel called from another thread wakes the pool and then sleeps until it is through, which takes tens of
/// microseconds. A kernel called from one of the pool's threads starts to work at once, and so is best called there
/// when many of them follow each other.
pub fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// Calls `work` for each task in `0..tasks`, on as many of the pool's threads as there are tasks for; each thread makes
/// its own `state`.
///
/// A thread goes through neighbouring tasks, which are neighbours in memory too: it reads one long stream. When it is
/// through, it takes what others have left. So one that starts late or is interrupted delays nobody by more than a task.
pub(in crate::cpu) fn share<S>(
    tasks: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) + Sync,
) {
    let threads = rayon::current_num_threads().min(tasks);
    let edge = |thread: usize| tasks * thread / threads;
    // The next task of each thread's part, and its end.
    let parts: Vec<(AtomicUsize, usize)> = (0..threads)
        .map(|thread| (AtomicUsize::new(edge(thread)), edge(thread + 1)))
        .collect();
    let run = |thread: usize| {
        let mut own = None;
        for part in 0..threads {
            let (next, end) = &parts[(thread + part) % threads];
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= *end {
                    break;
                }
                work(own.get_or_insert_with(&state), task);
            }
        }
    };
    match threads {
        0 => {}
        1 => run(0),
        _ => (0..threads).into_par_iter().with_max_len(1).for_each(run),
    }
}
