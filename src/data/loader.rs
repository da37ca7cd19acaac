//! Work done in parallel and ahead, handed over in order.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Results of `f(0)`, `f(1)`, ... `f(count - 1)`, computed by `threads` threads of their own, up to `ahead` of what has been
/// taken. A panic in `f` is passed on to whoever takes that result. Dropping it ends the work.
pub fn ordered_parallel<T: Send + 'static>(
    count: usize,
    threads: usize,
    ahead: usize,
    f: impl Fn(usize) -> T + Send + Sync + 'static,
) -> OrderedParallel<T> {
    let shared =
        Arc::new(Shared { state: Mutex::new(State::default()), changed: Condvar::new(), count, ahead: ahead.max(1) });
    let f = Arc::new(f);
    let workers = (0..threads.clamp(1, count.max(1)))
        .map(|_| {
            let (shared, f) = (shared.clone(), f.clone());
            std::thread::spawn(move || shared.work(&*f))
        })
        .collect();
    OrderedParallel { shared, workers, next: 0 }
}

/// See [`ordered_parallel`].
pub struct OrderedParallel<T> {
    shared: Arc<Shared<T>>,
    workers: Vec<JoinHandle<()>>,
    next: usize,
}

struct State<T> {
    /// The first index that no worker has begun.
    begun: usize,
    /// The first that has not been taken.
    taken: usize,
    done: BTreeMap<usize, std::thread::Result<T>>,
    stopped: bool,
}

impl<T> Default for State<T> {
    fn default() -> Self {
        State { begun: 0, taken: 0, done: BTreeMap::new(), stopped: false }
    }
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    count: usize,
    ahead: usize,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn work(&self, f: &(dyn Fn(usize) -> T + Send + Sync)) {
        loop {
            let mut state = self.lock();
            while !state.stopped && state.begun < self.count && state.begun >= state.taken + self.ahead {
                state = self.wait(state);
            }
            if state.stopped || state.begun == self.count {
                return;
            }
            let i = state.begun;
            state.begun += 1;
            drop(state);
            let result = catch_unwind(AssertUnwindSafe(|| f(i)));
            self.lock().done.insert(i, result);
            self.changed.notify_all();
        }
    }
}

impl<T> Iterator for OrderedParallel<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        if self.next == self.shared.count {
            return None;
        }
        let mut state = self.shared.lock();
        let result = loop {
            match state.done.remove(&self.next) {
                Some(result) => break result,
                None => state = self.shared.wait(state),
            }
        };
        self.next += 1;
        state.taken = self.next;
        drop(state);
        self.shared.changed.notify_all();
        Some(result.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}

impl<T> Drop for OrderedParallel<T> {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches what `f` throws.
            let _ = worker.join();
        }
    }
}
