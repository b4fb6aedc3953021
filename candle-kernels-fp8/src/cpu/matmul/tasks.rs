//! Work shared among rayon's threads.

use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `work` for each task in `0..tasks`, on as many of the pool's threads as there are tasks for. Each thread makes
/// its own `state` and takes the next task when it is done with one: a thread that starts late or is interrupted
/// delays nobody by more than a task.
pub(in crate::cpu) fn share<S>(
    tasks: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) + Sync,
) {
    let next = AtomicUsize::new(0);
    let run = |_| {
        let mut own = None;
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            work(own.get_or_insert_with(&state), task);
        }
    };
    match rayon::current_num_threads().min(tasks) {
        0 => {}
        1 => run(0),
        threads => (0..threads).into_par_iter().with_max_len(1).for_each(run),
    }
}
