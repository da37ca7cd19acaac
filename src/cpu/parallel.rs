//! Loops for threads that meet after every operation.
//!
//! A layer of one picture takes a fraction of a millisecond, and its threads meet two or three times. Rayon lets a thread that finds
//! nothing to do sleep after a few microseconds, and putting it to sleep and waking it takes as long as a good part of
//! the layer. So whoever shares out a loop looks for its end for a while before it sleeps ([`for_each`]), and during a forward
//! pass or a training step the other threads look for the next loop ([`on_a_worker`]).

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a thread looks for work, or for the end of it, before it sleeps.
const PATIENCE: Duration = Duration::from_millis(1);
/// Looks between two at the clock, at which other threads of the machine may also take the core.
const LOOKS: usize = 64;

/// Calls `work` with every number below `tasks`, on all threads. A thread begins with its own part of the numbers, the same in every
/// loop of so many: what it computed in the last one may still be in its cache.
pub fn for_each(tasks: usize, work: impl Fn(usize) + Sync) {
    share_out(tasks, &work);
}

/// Piece `i` where so many are shared out in `count` pieces of about the same size.
pub(super) fn piece(i: usize, count: usize, shared: usize) -> Range<usize> {
    i * shared / count..(i + 1) * shared / count
}

/// Calls `work` with every item, as [`for_each`] does with numbers.
pub fn for_each_of<T: Send>(items: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    for_each(items.len(), |i| {
        let item = items[i].lock().expect("nobody panics while taking an item").take();
        work(item.expect("an item is taken once"));
    });
}

type Work<'a> = &'a (dyn Fn(usize) + Sync);

fn share_out(tasks: usize, work: Work) {
    let threads = rayon::current_num_threads().min(tasks);
    if threads < 2 {
        (0..tasks).for_each(work);
    } else if rayon::current_thread_index().is_none() {
        rayon::scope(|_| share_out(tasks, work));
    } else {
        let shares = Shares::new(tasks, threads);
        let lead = || {
            shares.take(work);
            look_until(|| shares.are_done());
        };
        rayon::join(lead, || shares.take_on(threads - 1, work));
    }
}

/// Numbers that have not been taken, a share for each thread.
struct Shares {
    shares: Vec<Share>,
    tasks: usize,
    done: AtomicUsize,
}

/// A cache line of its own.
#[repr(align(64))]
struct Share {
    next: AtomicUsize,
    end: usize,
}

impl Shares {
    fn new(tasks: usize, threads: usize) -> Self {
        let start = |i: usize| i * tasks / threads;
        let shares = (0..threads).map(|i| Share { next: AtomicUsize::new(start(i)), end: start(i + 1) });
        Shares { shares: shares.collect(), tasks, done: AtomicUsize::new(0) }
    }

    /// Works on this thread's share and then on what is left of others'.
    fn take(&self, work: Work) {
        let own = rayon::current_thread_index().unwrap_or_default() * self.shares.len() / rayon::current_num_threads();
        let (before, from) = self.shares.split_at(own);
        for share in from.iter().chain(before) {
            let mut done = 0;
            loop {
                let task = share.next.fetch_add(1, Ordering::Relaxed);
                if task >= share.end {
                    break;
                }
                work(task);
                done += 1;
            }
            self.done.fetch_add(done, Ordering::Release);
        }
    }

    /// [`Shares::take`] on so many threads.
    fn take_on(&self, threads: usize, work: Work) {
        if threads == 1 {
            return self.take(work);
        }
        rayon::join(|| self.take_on(threads / 2, work), || self.take_on(threads - threads / 2, work));
    }

    /// Never, if a task has panicked: then [`rayon::join`] tells.
    fn are_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.tasks
    }
}

/// Runs `body` on one of the threads that compute: from another each loop would be handed over to them, and waited for asleep. Until it
/// is over the other threads look for work without sleeping, unless there is none for long.
pub fn on_a_worker<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return body();
    }
    // Always on the first: loops that rayon divides leave it the first half of the numbers then, as [`for_each`] does.
    let (over, body) = (AtomicBool::new(false), Mutex::new(Some(body)));
    let results = rayon::broadcast(|context| match context.index() {
        0 => {
            let _end = SetWhenDropped(&over);
            let body = body.lock().expect("nobody panics while taking it").take();
            body.map(|body| body())
        }
        _ => {
            look_for_work(|| over.load(Ordering::Acquire));
            None
        }
    });
    results.into_iter().flatten().next().expect("the first thread has run it")
}

/// However it ends.
struct SetWhenDropped<'a>(&'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Works on what others share out until `over`, or until there has been nothing for [`PATIENCE`].
///
/// Which also ends it where a thread has come to this in the middle of a task that `over` waits for.
fn look_for_work(over: impl Fn() -> bool) {
    let worked = || matches!(rayon::yield_now(), Some(rayon::Yield::Executed));
    while look_until(|| over() || worked()) && !over() {}
}

/// Whether `found` within [`PATIENCE`].
fn look_until(found: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if found() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > PATIENCE {
            return false;
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn on_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body)
    }

    fn add(count: &AtomicUsize, more: usize) {
        count.fetch_add(more, Ordering::Relaxed);
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 5] {
            for tasks in [0, 1, 2, 3, 7, 100] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                on_threads(threads, || for_each(tasks, |i| add(&runs[i], 1)));
                assert!(
                    runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1),
                    "{tasks} tasks on {threads} threads"
                );
            }
        }
    }

    #[test]
    fn every_item_is_taken_once() {
        for threads in [1, 2, 5] {
            let mut values = [0; 10];
            on_threads(threads, || {
                let chunks = values.chunks_mut(3).enumerate();
                for_each_of(chunks, |(i, chunk)| chunk.iter_mut().for_each(|value| *value += 1 + i));
            });
            assert_eq!(values, [1, 1, 1, 2, 2, 2, 3, 3, 3, 4], "{threads} threads");
        }
    }

    #[test]
    fn loops_within_loops_and_from_outside_end() {
        let count = AtomicUsize::new(0);
        let nested = || for_each(5, |_| for_each(7, |_| add(&count, 1)));
        nested();
        on_a_worker(|| (0..100).for_each(|_| nested()));
        on_threads(3, || on_a_worker(nested));
        assert_eq!(count.load(Ordering::Relaxed), 102 * 35);
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        for threads in [1, 2, 5] {
            for bad in [0, 9] {
                let run = || for_each(10, |i| assert_ne!(i, bad, "the bad one"));
                let result = catch_unwind(AssertUnwindSafe(|| on_threads(threads, run)));
                assert!(result.is_err(), "task {bad} on {threads} threads");
            }
        }
        assert!(catch_unwind(|| on_a_worker(|| panic!("within"))).is_err());
    }

    #[test]
    fn several_callers_at_once_end() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let sum = on_a_worker(|| {
                            let sum = AtomicUsize::new(0);
                            for_each(9, |i| add(&sum, i));
                            sum.into_inner()
                        });
                        assert_eq!(sum, 36);
                    }
                });
            }
        });
    }
}
